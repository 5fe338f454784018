"""Cascades and gears, offline: what was measured of models, and the plans that follow from it.

Pure: numbers in, plans out. CascadeServe (arXiv 2406.14424) is the source of the terms.
"""
