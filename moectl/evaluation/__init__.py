"""How good a model is, and whether two models are the same function."""
