"""Capture how a model routes, read what others captured, and say what it means."""
