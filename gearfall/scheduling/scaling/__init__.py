"""How many replicas there are: by load, by keep-alive, by gear plans."""
