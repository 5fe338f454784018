"""Models, deployments and the cluster around this router."""
