"""Cluster state: etcd, the typed view of it, and an election on it."""
