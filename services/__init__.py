"""The four services; each meets the others only through protos, Redis keys and etcd keys."""
