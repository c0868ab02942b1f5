"""`moectl families`: what can become what, and what cannot and why."""

from __future__ import annotations

from moectl.cli import options


def families(json: options.Json = False) -> None:
    """List the dense families, the MoE families they become, and the pairs that are refused with the reason."""
    from moectl.families.listing import listing, refusals
    from moectl.report import output

    pairs, refused = listing(), refusals()
    if json:
        output.emit_json("moectl.families/1", {"pairs": pairs, "refused": refused})
        return
    output.emit_table(list(pairs[0]), [list(row.values()) for row in pairs], title="Pairs")
    output.emit_table(list(refused[0]), [list(row.values()) for row in refused], title="Refused")
