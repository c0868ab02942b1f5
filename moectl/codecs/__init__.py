"""Ternary matrices below one bit per weight: code tables, encoding, decoding, and how they lie on disk."""
