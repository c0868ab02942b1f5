"""Routing traces that other programs recorded: one file per format, and one way to read them all."""
