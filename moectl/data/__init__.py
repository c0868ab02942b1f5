"""The one way any command reads `--data`, and the built-in text."""
