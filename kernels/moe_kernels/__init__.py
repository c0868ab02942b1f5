"""Expert kernels for Mixture-of-Experts layers, each beside a torch reference."""
