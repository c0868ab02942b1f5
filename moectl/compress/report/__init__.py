"""What compressing a model came to: one summary, as words, as a page and as JSON."""
