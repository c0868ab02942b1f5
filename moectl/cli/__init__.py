"""One file per command: parse, call one workflow, render. Nothing heavy is imported before a command runs."""
