"""Bytes on their way from disk through pool memory to a device: the native extension and leases."""
