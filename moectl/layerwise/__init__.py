"""Run a checkpoint one decoder layer at a time from disk."""
