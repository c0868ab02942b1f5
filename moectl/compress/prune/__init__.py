"""Experts removed: what is measured of them, which stay, and the smaller checkpoint."""
