"""What speaks with clients, operators and workers: REST, gRPC, and the sink of tokens."""
