"""Self-contained HTML pages: one file, no network, readable without scripts; the shared script saves figures as SVG.

Only the scripts that a page was made with can run: the policy names them by their hash.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Protocol

from moectl.report.output import Cell, plain
from moectl.text import escape as visible

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f8; color: #1c1c1c;
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 27px; line-height: 1.25; font-weight: 650; margin: 0 0 10px; text-wrap: balance; }
h2 { font-size: 18px; font-weight: 620; margin: 40px 0 10px; }
p { margin: 0 0 12px; max-width: 76ch; }
.lead, figcaption, .note { color: #50565c; }
figure { margin: 0 0 20px; background: #fff; border: 1px solid #e2e4e7; border-radius: 8px; padding: 14px 18px 10px; }
figure svg { display: block; width: 100%; height: auto; }
figure header { display: flex; align-items: baseline; justify-content: space-between; gap: 16px; margin-bottom: 4px; }
figure h3 { font-size: 14.5px; font-weight: 600; margin: 0; }
figcaption { font-size: 13px; margin-top: 4px; }
button { font: inherit; font-size: 12.5px; color: #1c1c1c; background: #fff; border: 1px solid #c9cdd2;
  border-radius: 5px; padding: 2px 10px; cursor: pointer; white-space: nowrap; }
button:hover, button:focus-visible { border-color: #0072b2; color: #0072b2; }
.scroll { overflow-x: auto; background: #fff; border: 1px solid #e2e4e7; border-radius: 8px; }
table { border-collapse: collapse; font-size: 12.5px; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: left; border-bottom: 1px solid #eceef0; white-space: nowrap; }
th { font-weight: 600; background: #fafbfc; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0; font-size: 13.5px; }
dt { color: #50565c; } dd { margin: 0; }
@media print { body { background: #fff; } button { display: none; } figure { break-inside: avoid; } }
"""

SCRIPT = """
document.addEventListener('click', event => {
  const button = event.target.closest('button[data-save]');
  if (!button) return;
  const text = new XMLSerializer().serializeToString(button.closest('figure').querySelector('svg'));
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'image/svg+xml'}));
  link.download = button.dataset.save;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
"""


class Part(Protocol):
    """A piece of a page."""

    def html(self) -> str:
        """The piece, everything in it escaped."""


@dataclass(frozen=True)
class Figure:
    """A drawing (SVG text) under a heading, with a caption; saved as `name`.svg."""

    heading: str
    svg: str
    caption: str
    name: str

    def html(self) -> str:
        """The figure with its button."""
        file = re.sub(r"[^A-Za-z0-9.-]+", "-", self.name).strip("-") + ".svg"
        head = f'<header><h3>{_text(self.heading)}</h3><button data-save="{escape(file)}">Save SVG</button></header>'
        return f"<figure>{head}{self.svg}<figcaption>{_text(self.caption)}</figcaption></figure>"


@dataclass(frozen=True)
class Table:
    """Rows under column names; columns of numbers are set right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def html(self) -> str:
        """The table, which scrolls sideways where it is too wide."""
        numeric = [all(isinstance(row[i], int | float | None) for row in self.rows) for i in range(len(self.columns))]

        def cells(tag: str, values: Sequence[Cell]) -> str:
            return "".join(
                f"<{tag}{' class=number' if right else ''}>{_text(plain(value))}</{tag}>"
                for value, right in zip(values, numeric, strict=True)
            )

        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        head = f"<thead><tr>{cells('th', self.columns)}</tr></thead>"
        return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class Heading:
    """What follows."""

    text: str

    def html(self) -> str:
        """The heading."""
        return f"<h2>{_text(self.text)}</h2>"


@dataclass(frozen=True)
class Paragraph:
    """Plain words."""

    text: str

    def html(self) -> str:
        """The paragraph."""
        return f"<p>{_text(self.text)}</p>"


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    pairs: Sequence[tuple[str, str]]

    def html(self) -> str:
        """The list."""
        return (
            "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in self.pairs) + "</dl>"
        )


def page(title: str, lead: str, parts: Sequence[Part], *, style: str = "", script: str = "") -> str:
    """A whole page; `title` says what was found, `lead` on what; `style` and `script` are added to the shared ones."""
    script = SCRIPT + script
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = "\n".join(part.html() for part in parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{_text(title)}</title><style>{STYLE}{style}</style></head>\n"
        f'<body><main><h1>{_text(title)}</h1><p class="lead">{_text(lead)}</p>\n{body}\n</main>'
        f"<script>{script}</script></body></html>\n"
    )


def write(path: Path, text: str) -> None:
    """Write a page, or any report, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _text(content: str) -> str:
    return escape(visible(content))
