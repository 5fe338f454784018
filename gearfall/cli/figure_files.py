"""Writes figures; needs the extra `plots`."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure


def save_figure(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write a figure as SVG and PNG and return the files. The same figure gives the same files."""
    directory.mkdir(parents=True, exist_ok=True)
    mpl.rcParams["svg.hashsalt"] = "gearfall"
    written = []
    for suffix in ("svg", "png"):
        path = directory / f"{name}.{suffix}"
        figure.savefig(path, metadata={"Date": None} if suffix == "svg" else None)
        written.append(path)
    return written
