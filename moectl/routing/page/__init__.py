"""The HTML report of an analysis: one self-contained file, to look at rather than to read."""
