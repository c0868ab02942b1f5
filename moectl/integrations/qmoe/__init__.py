"""Checkpoints with coded experts in transformers (`quant_method` "qmoe"); docs/format-qmoe.md has their tensors."""
