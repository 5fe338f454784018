"""gearfall serves many language models from few machines: this package is what its services share."""

__version__ = "0.1.0"
