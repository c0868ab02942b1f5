"""Quantisers of expert matrices: GPTQ for many matrices at once, to ternary rows or to uniform grids."""
