"""Architectures whose routing is no router of its own: small modules `forward(x_BLD, context) -> (y_BLD, aux_loss)`.

What they need of the tokens is in the context, flat: T = B * L labels. Those that hold experts are given a router.
"""
