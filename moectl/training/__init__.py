"""Train a model: a short loop on torch's own parts."""
