"""Messages and stubs generated from `protos/` by `make gen`; never edited, never committed."""
