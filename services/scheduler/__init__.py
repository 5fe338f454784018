"""The scheduler: places, scales, migrates and retires replicas; its leader is elected in etcd."""
