"""What is on disk: open a checkpoint, plan a new one, write it, verify it. Knows bytes, no models."""
