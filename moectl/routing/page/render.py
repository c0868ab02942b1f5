"""The page put together: verdict, advice, heat map with a page per expert, text, domains, pairs, flow, what-ifs, ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from moectl.report.html import Facts, Figure, Heading, Paragraph, Part, Table, page
from moectl.routing.analysis import MEASURES, Stream
from moectl.routing.judge import flags
from moectl.routing.page import figures
from moectl.routing.page.comparison import alike, comparison, courses, masked, shortened
from moectl.routing.page.payload import FIGURES, payload, spread
from moectl.routing.page.sureness import NULLS, facts
from moectl.routing.page.what_if import advised, what_ifs
from moectl.routing.report import Report
from moectl.routing.spelling import Spell
from moectl.routing.verdict import SIGNS, Card
from moectl.text import escape as visible

STYLES = ("explore.css", "what_if.css")
SCRIPTS = ("explore.js", "what_if.js")

INTRODUCTION = (
    "A dashed line is what chance gives. Click a cell of the map, or move the slider, to see a layer and an expert."
)


@dataclass(frozen=True)
class Raw:
    """Markup that was made, and escaped, elsewhere."""

    markup: str

    def html(self) -> str:
        """It."""
        return self.markup


def render(found: Report, spell: Spell | None = None, command: str = "") -> str:
    """The page as text.

    Args:
        found: what the page says.
        spell: makes text of token ids; without it they stay numbers, and no text is shown.
        command: that makes the page again.
    """
    analysis, cards = found.analysis, found.cards
    advice = [] if found.advice is None else advised(found.advice)
    parts: list[Part] = [_cards(cards), *advice, *_surprises(found), Paragraph(INTRODUCTION)]
    for number, stream in enumerate(analysis.streams):
        if len(analysis.streams) > 1:
            parts.append(Heading(stream.name.capitalize()))
        parts.append(Raw(_explored(number, stream, len(analysis.streams))))
    parts += what_ifs(found)
    if found.other is not None and found.differences is not None:
        parts += comparison(analysis, found.other, found.differences)
    parts += courses(found.courses)
    if found.losses is not None:
        parts += masked(found.losses)
    if found.weights:
        parts += alike(found.weights)
    parts += [Heading("All layers"), *(_table(stream) for stream in analysis.streams)]
    parts += [Heading("How sure"), Facts(list(facts(found, command))), Heading("What chance means here"), Facts(NULLS)]
    data = f'<script type="application/json" id="routing">{payload(analysis, spell)}</script>'
    style, script = ("".join(map(_read, names)) for names in (STYLES, SCRIPTS))
    return page(_title(cards), _lead(found), [*parts, Raw(data)], style=style, script=script)


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _title(cards: Sequence[Card]) -> str:
    """The headline of the worst balance: of the first stream if both are as good."""
    order = ("poor", "fair", "good", "none")
    return min(
        (card for card in cards if card.topic.endswith("Balance")), key=lambda card: order.index(card.level)
    ).headline


def _lead(found: Report) -> str:
    layers = sum(len(stream.points) for stream in found.analysis.streams)
    statistics = found.analysis.streams[0].recording.statistics
    size = f"{layers} MoE layer{'s' * (layers != 1)}, {statistics.tokens:,} tokens"
    return f"{found.analysis.name}: {size} of {', '.join(statistics.domains)}."


def _cards(cards: Sequence[Card]) -> Raw:
    made = "".join(
        f'<article class="card {card.level}"><h3>{SIGNS[card.level]} {_text(card.topic)}</h3>'
        f"<strong>{_text(card.headline)}</strong><p>{_text(card.detail)}</p></article>"
        for card in cards
    )
    return Raw(f'<div class="cards">{made}</div>')


def _surprises(found: Report) -> list[Part]:
    items = [f"<li>{_text(f'Layer {each.layer}: {each.text}.')}</li>" for each in found.surprises]
    return [Heading("What stands out"), Raw(f'<ol class="surprises">{"".join(items)}</ol>')] if items else []


def _explored(number: int, stream: Stream, streams: int) -> str:
    """Everything of a stream that follows its slider."""
    room = FIGURES // streams
    points = stream.points
    maps = [
        f"<div{' class=by-load hidden' * at}>{each.html()}</div>" for at, each in enumerate(figures.load_maps(stream))
    ]
    options = [f'<option value="{place}">{_text(point.label)}</option>' for place, point in enumerate(points)]
    domains = {points.index(each.point): figures.domain_bars(stream, each) for each in stream.domains}
    pairs = {points.index(each.point): figures.pairs_map(stream, each) for each in stream.coactivation}
    ribbons = {points.index(each.source): figures.flow_ribbons(stream, each) for each in stream.flow}
    return f"""<section data-stream="{number}">
<div class="map">{"".join(maps)}</div>
<div class="scripted pick" hidden><button class="order" aria-pressed="false">Sort experts by load</button>
<span class="map-told note"></span></div>
<div class="scripted panel expert-page" hidden>
<div class="pick"><label>Layer <select class="layer">{"".join(options)}</select></label>
<label>Expert <select class="expert-number"></select></label></div>
<h3 class="expert-title"></h3><div class="expert" role="group"></div></div>
<div class="scripted scrub" hidden><label for="scrub-{number}">Layer</label>
<input id="scrub-{number}" type="range" min="0" max="{len(points) - 1}" value="0"><output></output></div>
<div class="scripted panel text" hidden><h3>The text, coloured by the expert of first choice</h3>
<div class="legend" role="group" aria-label="Experts of this layer"></div>
<div class="sample" tabindex="0" role="group" aria-label="Sample of the text"></div>
<p class="told" aria-live="polite">Point at a token, or use the arrow keys, to see all its experts.</p></div>
{_layered("Domains", domains, room)}
{_layered("Experts that go together", pairs, room)}
{_layered("From layer to layer", ribbons, room)}
<h2>Over the layers</h2>
{"".join(each.html() for each in figures.by_layer(stream))}
</section>"""


def _layered(heading: str, of_layer: Mapping[int, Figure | None], room: int) -> str:
    """A figure per layer, of which the slider shows one; evenly spaced layers where there is no room for all."""
    made = [(layer, each.html()) for layer, each in of_layer.items() if each is not None]
    if not made:
        return ""
    kept = spread(len(made), room // max(len(markup) for _layer, markup in made))
    note = f'<p class="note">Drawn for {len(kept)} of {len(made)} layers.</p>' if len(kept) < len(made) else ""
    drawn = "".join(f'<div data-layer="{made[place][0]}">{made[place][1]}</div>' for place in kept)
    return f'<h2>{_text(heading)}</h2>{note}<div class="layered">{drawn}</div>'


def _table(stream: Stream) -> Table:
    known = [name for name in ("layer", *MEASURES) if any(row.get(name) is not None for row in stream.rows)]
    rows = [
        [*(row.get(name) for name in known), ", ".join(flags(stream, number))] for number, row in enumerate(stream.rows)
    ]
    return Table([*(name.replace("_", " ") for name in known), "flags"], shortened(rows))


def _text(words: str) -> str:
    return escape(visible(words))
