"""`moectl routers`: every router there is, what it needs, and what its formula was checked against."""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli import options

Name = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="One of them, with its options.", show_default=False)
]


def routers(name: Name = None, json: options.Json = False) -> None:
    """List the routers of the literature that --replay, `moectl train --router` and `moectl bench routers` know.

    One without a source was written from memory: its status is unverified.
    """
    from moectl.report import output
    from moectl.routers.listing import described, listing

    if name is not None:
        document = described(name)
        if json:
            output.emit_json("moectl.router/1", document)
            return
        output.emit_table(("option", "default", "meaning"), [tuple(row.values()) for row in document["options"]])
        output.note(document["about"])
        return
    rows = listing()
    if json:
        output.emit_json("moectl.routers/1", {"routers": rows})
        return
    output.emit_table(list(rows[0]), [list(row.values()) for row in rows])
    verified = sum(row["status"] == "verified" for row in rows)
    output.note(f"{verified} of {len(rows)} verified against a source; `moectl routers NAME` has options and formula.")
