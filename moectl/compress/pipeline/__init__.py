"""Quantising the experts of a checkpoint one decoder layer at a time, from disk to disk."""
