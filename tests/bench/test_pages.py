"""Tables, sentences and pages made of results."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from moectl.bench import markdown, page, run, tables
from moectl.errors import CheckFailed, InputError, UsageError
from moectl.report import output
from moectl.report.charts import Bar, bars
from moectl.report.svg import Scale, log_scale, mark


@pytest.fixture
def document(settings, roof):
    made = run.measure(settings)
    hostile = {**made["rows"][0], "backend": "<b>&\x1b[31m", "p50_ms": None, "reason": "<script>"}
    return {**made, "rows": [*made["rows"], hostile], "command": "moectl bench layer --shape <x>"}


class Reader(HTMLParser):
    """Collects tags, what they refer to, and text; fails on a tag that is closed without being open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "action", "xlink:href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_one_file_that_says_it_all(document):
    text = page.render(document)
    reader = Reader()
    reader.feed(text)
    assert not reader.open and not reader.links
    assert not re.search(r"(src|href)\s*=|@import|url\(", text.replace("link.href =", ""))
    assert set(re.findall(r"https?://[^\"'<\s]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text and len(text) < 200_000
    words = "".join(reader.words)
    for row in document["rows"]:
        if row["p50_ms"]:
            assert output.plain(tables.rounded(row["p50_ms"], 4)) in words
    assert tables.finding(document) in words and "<script>" in words and "\x1b" not in text
    assert reader.tags.count("button") == reader.tags.count("svg") == 2
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        svg = ElementTree.fromstring(drawing)  # what the button saves stands alone
        assert svg.get("role") == "img" and len(svg.get("aria-label")) > 40


def test_what_a_person_sees(document):
    ((title, columns, rows),) = tables.short(document)
    assert title == "small float32 fwd, ideal within 50 GFLOP/s and 20 GB/s"
    assert columns[:4] == ["tokens", "backend", "ms", "p20-p80"] and len(rows) == 6
    columns, rows = tables.full(document)
    assert len(rows) == 7 and "other_clock_ms" in columns
    assert tables.missing(document) == ["<b>&\x1b[31m: <script>"]


def test_the_finding_is_ours_against_the_fastest_of_the_others():
    def rows(ours, *theirs, tokens=1):
        named = [("moectl", ours), *((f"peer{i}", time) for i, time in enumerate(theirs))]
        start = {"model": "m", "dtype": "d", "what": "fwd", "tokens": tokens, "percent_of_floor": 1.0}
        return [{**start, "backend": name, "p50_ms": time} for name, time in named]

    two = {"kind": "layer", "rows": [*rows(1.0, 2.0, 1.5), *rows(2.0, 1.0, 4.0, tokens=2)]}
    assert tables.finding(two).startswith("moectl is 0.50 to 1.50 times as fast as the fastest of the others")
    assert tables.finding(two).endswith("1 of 2 cells")
    assert tables.finding({"kind": "layer", "rows": rows(1.0, 2.0)}).endswith(
        "2.00 times as fast as peer0, and ahead in all 1 cells"
    )
    assert "of the floor" in tables.finding({"kind": "layer", "rows": rows(1.0)})


def test_markdown_stays_in_step(document, tmp_path):
    results, readme = tmp_path / "cpu.json", tmp_path / "README.md"
    results.write_text(output.json_text("moectl.bench/1", document))
    made = markdown.tables([results])
    table = made["cpu"]
    assert table.startswith(
        "| d,f,E,k or model | dtype | pass | tokens | moectl | grouped_mm | loop |\n|---|---|---|---:|"
    )
    assert table.count("**") == 4 and "Not measured: " in table and "`moectl bench layer" in table
    before = "# T\n<!-- bench cpu -->\nold\n<!-- /bench cpu -->\nafter"
    after = markdown.replaced(before, made, readme)
    assert after == f"# T\n<!-- bench cpu -->\n{table}\n<!-- /bench cpu -->\nafter"
    assert markdown.replaced(after, made, readme) == after
    markdown.require_in_step(after, made, readme)
    for text in (before, after.replace("float32", "float16")):
        with pytest.raises(CheckFailed, match="cpu"):
            markdown.require_in_step(text, made, readme)
    with pytest.raises(InputError, match="no place for the table of cpu"):
        markdown.replaced("nothing here", made, readme)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError):
        markdown.tables([results, results.rename(tmp_path / "cpu.json"), tmp_path / "cpu.json"])


def test_scales():
    scale = Scale(0, 97, 100, 200)
    assert scale.ticks() == [0, 20, 40, 60, 80] and (scale(0), scale(97)) == (100, 200)
    wide, narrow = log_scale([0.01, 1000], 0, 10), log_scale([3, 5], 0, 10)
    assert set(wide.ticks()) <= {10.0**power for power in range(-3, 5)} and len(wide.ticks()) >= 3
    assert narrow.ticks() == [2, 5] and wide(wide.low) == 0 and wide(wide.high) == pytest.approx(10)


def test_bars_are_as_long_as_their_values():
    drawing = ElementTree.fromstring(
        bars("t", "d", [("g", [Bar("a", 50, "fifty"), Bar("b", 100, "full")])], ["a", "b"], "x")
    )
    rectangles = [e for e in drawing.iter() if e.tag.endswith("rect") and e.get("rx")]
    widths = [float(rectangle.get("width")) for rectangle in rectangles]
    assert widths[1] == pytest.approx(2 * widths[0], rel=1e-3) and len({r.get("fill") for r in rectangles}) == 2


def test_marks_differ_without_colour():
    assert len({mark(number, 0, 0, "#000000") for number in range(8)}) == 8
