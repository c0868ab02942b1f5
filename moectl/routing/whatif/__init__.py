"""What would have happened to the tokens of a trace under another router, capacity, cache or placement."""
