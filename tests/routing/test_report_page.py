"""The page: one file without a network, whatever names and tokens say; in a browser, where one is found, it answers."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import chromium
import pytest
import synthetic

from moectl.routing.analysis import analyse, compared
from moectl.routing.page.payload import embedded, spread
from moectl.routing.page.render import render
from moectl.routing.report import Report

HOSTILE = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "\x1b[31m", "\u2028", "<!--", "a b")
LIMIT = 8_000_000
NO_BROWSER = "no Chromium was found (CHROMIUM names one): the page's script is not run, only its elements are read"


class Reader(HTMLParser):
    """The elements with their attributes, the text outside scripts, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] == ["script"] else self.words).append(data)

    def having(self, **wanted: str) -> list[dict[str, str | None]]:
        """The attributes of the elements of which one has such a word, as `class`."""
        return [
            attributes
            for _tag, attributes in self.elements
            if all(word in (attributes.get(name.rstrip("_")) or "").split() for name, word in wanted.items())
        ]


def spell(ids: Sequence[int]) -> list[str]:
    return [HOSTILE[number % len(HOSTILE)] for number in ids]


@pytest.fixture(scope="module")
def report() -> Report:
    """Two models with hostile names: domains part, layer 2 has collapsed, expert 3 of layer 1 is missing."""
    tokens = synthetic.tokens(36, 64, domains=("code", "</script>", "<b>sums"))
    kind: dict[str, Any] = {"layers": 5, "experts": 16, "by_domain": 1.5}
    made = synthetic.trace(tokens, unseen={1: [3]}, collapsed=[2], **kind)
    one = analyse('m"><script>', {"decoder": synthetic.recording(made)})
    other = analyse("other", {"decoder": synthetic.recording(synthetic.trace(tokens, seed=4, **kind))})
    return Report(one, other, compared(one, other))


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return render(report, spell, "moectl analyze-routing <m>")


def test_it_is_one_file_that_asks_for_nothing(text: str) -> None:
    page = Reader(text)
    assert not page.open
    for _tag, attributes in page.elements:
        assert not {"src", "href", "action", "data", "style", "xlink:href"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert set(re.findall(r"https?://[^\"'<\s\\]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    assert len(text) < LIMIT


def test_only_its_own_script_can_run(text: str) -> None:
    page = Reader(text)
    data, script = page.scripts
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in (policy or "")
    assert "default-src 'none'" in (policy or "") and "unsafe-eval" not in (policy or "")
    assert [a.get("type") for tag, a in page.elements if tag == "script"] == ["application/json", None]
    assert not set("<>&\u2028") & set(data)


def test_hostile_text_arrives_as_text(text: str) -> None:
    page = Reader(text)
    streams = json.loads(page.scripts[0])["streams"]
    pieces = {piece for document in streams[0]["text"]["documents"] for piece in document["pieces"]}
    assert pieces == {HOSTILE[0], HOSTILE[1], "\\x1b[31m", "\\u2028", "<!--", "a b"}
    assert streams[0]["domains"] == ["code", "</script>", "<b>sums"] and "\x1b" not in text
    assert json.loads(embedded({"a": "</script>&<!--\n"})) == {"a": "</script>&<!--\n"}


def test_every_figure_stands_alone_and_speaks(text: str) -> None:
    page = Reader(text)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert (
        len(drawings)
        == len(page.having(role="img"))
        == sum(tag == "button" and "data-save" in a for tag, a in page.elements)
    )
    assert len(drawings) == 2 + 5 + 5 + 4 + 4 + 2, "maps, domains, pairs, flow, over the layers, comparison"
    for drawing in drawings:
        svg = ElementTree.fromstring(drawing)
        assert len(svg.get("aria-label") or "") > 40 and "style" not in svg.attrib
    files = [a["data-save"] for _tag, a in page.elements if "data-save" in a]
    assert len(set(files)) == len(files) and all(re.fullmatch(r"[\w.-]+\.svg", file or "") for file in files)


def test_it_says_what_was_found_without_scripts(text: str, report: Report) -> None:
    page = Reader(text)
    words = " ".join(page.words)
    assert "Layer 2 is collapsed onto 2.0 of 16 experts" in words
    for card in report.cards:
        assert card.headline in words and card.detail in words
    assert len(page.having(class_="card")) == len(report.cards) == 5
    assert all(surprise.text in words for surprise in report.surprises)
    assert "Compared with other" in words and "moectl analyze-routing <m>" in words and "How sure" in words
    assert all(a.get("hidden", "") is None for a in page.having(class_="scripted")), "shown by the script alone"


def test_the_numbers_of_the_expert_pages_are_those_of_the_analysis(text: str, report: Report) -> None:
    (stream,) = report.analysis.streams
    data = json.loads(Reader(text).scripts[0])["streams"][0]
    for number, load in enumerate(stream.balance):
        count = stream.recording.statistics.loads[number].count_E
        assert data["load"][number] == pytest.approx(count / load.tokens, abs=1e-4)
    assert data["start"] == [2, stream.balance[2].busiest]
    shares = stream.domains[0]
    assert data["share"][0][0][1] == pytest.approx(shares.share_DE[1].tolist(), abs=1e-4)
    (token, share, count), *_ = data["words"][0][5]
    best = stream.vocabulary["input"][0].top[5][0]
    assert (token, count) == (best.token, best.count) and share == pytest.approx(best.share, abs=1e-3)


def test_the_largest_models_fit() -> None:
    """40 layers of 256 experts, 6 domains: more than what the caps leave room for."""
    domains = [f"domain {number}" for number in range(6)]
    tokens = synthetic.tokens(24, 40, domains=domains, vocabulary=60)
    made = synthetic.trace(tokens, layers=40, experts=256, top_k=8, by_domain=1.0, scores=False)
    text = render(Report(analyse("large", {"decoder": synthetic.recording(made)})), spell)
    assert len(text) < LIMIT and "Drawn for" in text
    assert spread(58, 3) == [0, 28, 57] and spread(2, 5) == [0, 1]


def test_ids_without_a_tokenizer_are_numbers(report: Report) -> None:
    data = json.loads(Reader(render(report)).scripts[0])
    assert data["streams"][0]["text"] is None and data["tokens"] == {}


@pytest.fixture(scope="module")
def browser(text: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    program = chromium.find()
    if program is None:
        pytest.skip(NO_BROWSER)
    folder = tmp_path_factory.mktemp("page")
    (folder / "page.html").write_text(text, encoding="utf-8")
    with chromium.Browser(program, folder / "profile") as opened:
        opened.open(folder / "page.html")
        yield opened
        assert opened.complaints == [] and opened.requests == [(folder / "page.html").as_uri()]


def test_a_page_that_asks_or_runs_anything_else_would_be_seen(text: str, tmp_path: Path) -> None:
    """What the fixture above holds against the page, planted."""
    program = chromium.find()
    if program is None:
        pytest.skip(NO_BROWSER)
    planted = '<img src="http://example.com/x.png"><script>document.title = "ran"</script></main>'
    (tmp_path / "page.html").write_text(text.replace("</main>", planted), encoding="utf-8")
    with chromium.Browser(program, tmp_path / "profile") as opened:
        opened.open(tmp_path / "page.html")
        assert opened.evaluate("document.title") != "ran"
        assert len(opened.requests) == 2 and len(opened.complaints) == 2


def point_at(browser: chromium.Browser, selector: str) -> tuple[float, float]:
    """The middle of an element, after it was scrolled to."""
    browser.evaluate(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
    box = browser.evaluate(f"JSON.stringify(document.querySelector('{selector}').getBoundingClientRect())")
    place = json.loads(box)
    return place["x"] + place["width"] / 2, place["y"] + place["height"] / 2


def shown(browser: chromium.Browser, selector: str) -> str:
    return str(browser.evaluate(f"document.querySelector('{selector}').textContent"))


def cell(browser: chromium.Browser, layer: int, column: int) -> tuple[float, float]:
    """Where a cell of the visible map is."""
    browser.evaluate("document.querySelector('.map').scrollIntoView({block: 'center'})")
    found = browser.evaluate(
        "(() => { const all = [...document.querySelectorAll('.map .cells')];"
        "const g = all.find(each => each.getClientRects().length);"
        f"const {{left, top, width, height}} = g.dataset, x = +left + ({column} + .5) * width;"
        f"const p = new DOMPoint(x, +top + ({layer} + .5) * height).matrixTransform(g.ownerSVGElement.getScreenCTM());"
        "return JSON.stringify([p.x, p.y]); })()"
    )
    x, y = json.loads(found)
    return x, y


def test_a_click_on_a_cell_opens_the_page_of_its_expert(browser: chromium.Browser, report: Report) -> None:
    assert "Expert 0 of layer 2 serves 100%" in shown(browser, ".expert-title"), "the worst layer comes first"
    browser.click(*cell(browser, 1, 3))
    assert shown(browser, ".expert-title") == "Expert 3 of layer 1 was not seen"
    browser.click(*cell(browser, 4, 7))
    load = report.analysis.streams[0].recording.statistics.loads[4]
    share = 100 * load.count_E[7] / report.analysis.streams[0].recording.statistics.tokens
    title = shown(browser, ".expert-title")
    assert title.startswith("Expert 7 of layer 4 serves ")
    assert float(title.split("serves ")[1].split("%")[0]) == pytest.approx(share, rel=1e-2)
    assert browser.evaluate("document.querySelectorAll('.expert li').length") > 10
    order = sorted(range(16), key=lambda expert: -load.count_E[expert])
    browser.click(*point_at(browser, ".order"))
    browser.click(*cell(browser, 4, 0))
    assert shown(browser, ".expert-title").startswith(f"Expert {order[0]} of layer 4 ")
    browser.click(*point_at(browser, ".order"))


def test_the_slider_changes_the_layer_of_text_and_figures(browser: chromium.Browser, report: Report) -> None:
    for layer in (0, 3):
        browser.evaluate(
            f"(() => {{ const s = document.querySelector('.scrub input'); s.value = {layer};"
            "s.dispatchEvent(new Event('input')); })()"
        )
        visible = browser.evaluate(
            "[...document.querySelectorAll('.layered > div')].filter(e => !e.hidden).map(e => +e.dataset.layer)"
        )
        assert visible == [layer] * 3
        first = report.analysis.streams[0].recording.trace.layers[layer].index_TK[0].tolist()
        browser.click(*point_at(browser, '.sample span[data-at="0"]'))
        told = shown(browser, ".told")
        assert f"layer {layer}: expert {first[0]} (" in told and f"expert {first[1]} (" in told
    assert browser.evaluate("document.querySelector('.sample span[data-at]').style.backgroundColor") != ""
    browser.evaluate("document.querySelector('.sample').focus()")
    browser.press("ArrowRight")
    second = report.analysis.streams[0].recording.trace.layers[3].index_TK[1, 0]
    assert f"layer 3: expert {second} " in shown(browser, ".told")


def test_one_expert_alone_in_the_text(browser: chromium.Browser) -> None:
    browser.click(*point_at(browser, ".legend button"))
    coloured = "[...document.querySelectorAll('.sample span[data-at]')].filter(e => e.style.backgroundColor).length"
    few, all_ = (
        browser.evaluate(coloured),
        browser.evaluate("document.querySelectorAll('.sample span[data-at]').length"),
    )
    assert 0 < few < all_ / 2
    assert browser.evaluate("document.querySelector('.legend button').getAttribute('aria-pressed')") == "true"


def test_a_figure_is_saved_as_it_is_drawn(browser: chromium.Browser) -> None:
    browser.evaluate(
        "URL.createObjectURL = blob => { window.saved = blob; return '#saved'; }; URL.revokeObjectURL = () => 0"
    )
    browser.click(*point_at(browser, ".map button[data-save]"))
    assert browser.evaluate("window.saved.type") == "image/svg+xml" and browser.evaluate("window.saved.size") > 1000
