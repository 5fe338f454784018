"""The router: admits requests, runs cascades, owns every token log, streams to the client."""
