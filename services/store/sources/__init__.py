"""Where bytes come from when this node has none: neighbours and URLs."""
