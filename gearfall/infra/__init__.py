"""Everything that touches the world: etcd, Redis, gRPC channels, native code, processes."""
