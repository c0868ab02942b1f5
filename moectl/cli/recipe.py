"""`moectl recipe`: what recipe files can say."""

from __future__ import annotations

import typer

app = typer.Typer(help="Recipe files of `moectl upcycle`.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def recipe() -> None:
    """Recipe files of `moectl upcycle`."""


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipe files (for `moectl upcycle btx --recipe`), for editors and other programs."""
    import json

    from moectl.upcycle.recipe_file import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))
