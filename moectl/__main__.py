"""`python -m moectl` is `moectl`."""

from moectl.cli.main import main

main()
