"""The verdict on routing whose character is known, and that no number is left without its null."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as some

from moectl.report.output import json_text
from moectl.routing import terminal
from moectl.routing.analysis import MEASURES, Analysis, analyse, compared, fair_max_vio, to_json
from moectl.routing.judge import flags
from moectl.routing.page.render import render
from moectl.routing.report import Report, report
from moectl.routing.study import Study
from moectl.routing.surprises import surprises
from moectl.routing.verdict import Card, contrast, verdict
from moectl.traces.statistics import RoutingStatistics, statistics_of
from moectl.traces.store import Recording
from moectl.traces.trace import RoutingTrace


def analysed(trace: RoutingTrace, sampled: float = 1.0) -> Analysis:
    return analyse("made", {"decoder": synthetic.recording(trace, sampled)})


def cards(analysis: Analysis) -> dict[str, Card]:
    return {card.topic: card for card in verdict(analysis)}


def flagged(analysis: Analysis, word: str) -> list[int]:
    stream = analysis.streams[0]
    return [n for n in range(len(stream.points)) if any(word in flag for flag in flags(stream, n))]


def test_fair_routing_is_balanced_and_nothing_stands_out() -> None:
    found = analysed(synthetic.trace(synthetic.tokens(60, 64)))
    told = cards(found)
    assert told["Balance"].level == "good" and told["Balance"].headline.startswith("Balanced")
    assert [told[topic].level for topic in ("Domains", "Words", "Locality")] == ["none"] * 3
    assert told["How sure"].level == "good"
    assert not surprises(found) and not any(flags(found.streams[0], n) for n in range(4))


@pytest.mark.parametrize(("layer", "experts", "top_k"), [(0, 8, 2), (3, 8, 1), (2, 64, 8)])
def test_a_collapsed_layer_is_named_though_the_pooled_loss_hides_it(layer: int, experts: int, top_k: int) -> None:
    found = analysed(synthetic.trace(experts=experts, top_k=top_k, collapsed=[layer]))
    balance = cards(found)["Balance"]
    assert balance.level == "poor" and balance.headline.startswith(f"Layer {layer} is collapsed onto {top_k}.0 of ")
    assert flagged(found, "collapsed") == [layer]
    rows = found.streams[0].rows
    assert rows[layer]["aux"] == pytest.approx(experts, rel=1e-3) and rows[layer]["max_vio"] == experts / top_k - 1
    assert f"Balancing loss {experts}" in balance.detail
    assert all(surprise.kind != "unseen" for surprise in surprises(found)), "the collapse says it already"


def test_two_collapsed_layers_in_one_sentence() -> None:
    headline = cards(analysed(synthetic.trace(collapsed=[1, 2])))["Balance"].headline
    assert headline.startswith("Layers 1-2 are collapsed")


def test_an_expert_that_is_missing_is_named_with_its_chance() -> None:
    found = analysed(synthetic.trace(unseen={1: [3]}))
    balance = cards(found)["Balance"]
    assert balance.level == "fair" and balance.headline.endswith("1 expert was not seen")
    assert "3 of layer 1; chance of that if fair: below 1e-12" in balance.detail
    (first, *_) = surprises(found)
    assert (first.kind, first.layer, first.expert) == ("unseen", "1", 3)


def test_what_is_dropped_is_said() -> None:
    made = synthetic.trace()
    made.layers[1].index_TK[::2, 1] = -1
    balance = cards(analysed(made))["Balance"]
    assert balance.level == "fair" and balance.headline.endswith("layer 1 drops 25% of the assignments")
    assert flagged(analysed(made), "drops") == [1]
    made.layers[1].index_TK[:] = -1
    assert "layer 1 drops 100%" in cards(analysed(made))["Balance"].headline


@pytest.mark.parametrize("top_k", [2, 8])
def test_the_best_of_many_pairs_is_no_finding(top_k: int) -> None:
    """Of 64 by 64 pairs of experts some exceed chance several times over."""
    made = synthetic.trace(synthetic.tokens(30, 250), experts=64, top_k=top_k, layers=6, scores=False)
    assert surprises(analysed(made)) == []
    here, after = made.layers[:2]
    after.index_TK[here.index_TK[:, 0] == 7, 0] = 9
    (found, *_) = surprises(analysed(made))
    assert (found.kind, found.layer, found.expert) == ("flow", "0", 7) and "100%" in found.text


def test_few_tokens_are_no_evidence() -> None:
    found = analysed(synthetic.trace(synthetic.tokens(3, 2), experts=64, top_k=8))
    assert len(found.streams[0].balance[0].unseen) > 0
    assert cards(found)["Balance"].level == "none" and "Too few" in cards(found)["Balance"].headline
    assert cards(found)["How sure"].level == "fair" and not flagged(found, "unseen")
    assert "Too few" in cards(found)["Locality"].headline


def test_domains_words_and_neighbours_are_seen_where_they_are() -> None:
    assert flagged(analysed(synthetic.trace(by_domain=2.0)), "domains") == [0, 1, 2, 3]
    assert "layers 0-3" in cards(analysed(synthetic.trace(by_domain=2.0)))["Domains"].headline
    assert flagged(analysed(synthetic.trace(by_word=5.0)), "words") == [0, 1, 2, 3]
    assert flagged(analysed(synthetic.trace(sticky=2.0)), "repeats") == [0, 1, 2, 3]
    top = surprises(analysed(synthetic.trace(by_domain=2.0)))[0]
    assert top.kind == "domain" and top.look.startswith("--mask ") and top.null < top.number


def test_one_document_of_each_domain_cannot_tell_them_apart() -> None:
    found = cards(analysed(synthetic.trace(synthetic.tokens(3, 400), by_domain=2.0)))
    assert found["Domains"].headline.startswith("Too few documents") and found["Domains"].level == "none"


def test_a_skewed_load_may_be_the_only_domain() -> None:
    made = synthetic.trace(synthetic.tokens(20, 64, domains=("all",)), experts=32, by_word=0.0)
    for routed in made.layers:
        routed.index_TK[np.arange(len(made)) % 4 > 0] %= 2
        routed.index_TK[:, 1] = (routed.index_TK[:, 0] + 1) % 32
    balance = cards(analysed(made))["Balance"]
    assert balance.level == "poor" and "skewed" in balance.headline and "one domain" in balance.detail


def test_an_expert_that_serves_every_token_is_no_balance() -> None:
    """Of 3 experts, 2 a token, it gets but 1.5 times an even share: as much as there is."""
    made = synthetic.trace(experts=3, top_k=2)
    made.layers[2].index_TK[:] = np.stack([np.zeros(len(made)), np.arange(len(made)) % 2 + 1], 1)
    balance = cards(analysed(made))["Balance"]
    assert balance.level == "fair" and balance.headline == "Uneven: an expert gets 1.5 times an even share"
    assert cards(analysed(synthetic.trace(experts=3, top_k=2)))["Balance"].level == "good"


def test_a_few_repeats_are_luck() -> None:
    """96 layers with independent tokens, 4 repeats expected in each: a quarter more is no rare thing."""
    one = [synthetic.tokens(4, 50, domains=("all",), seed=seed) for seed in range(24)]
    short = [synthetic.trace(of, experts=64, top_k=8, seed=seed) for seed, of in enumerate(one)]
    assert sum(len(flagged(analysed(made), "repeats")) for made in short) <= 2


@pytest.mark.parametrize("busiest", [0.0, 0.75])
def test_neighbours_that_keep_together_are_seen_whatever_the_loads(busiest: float) -> None:
    """Also where two of three independent ones repeat anyway."""
    made = synthetic.trace(synthetic.tokens(12, 200, domains=("all",)), experts=4, top_k=1, layers=1)
    index_T1, generator = made.layers[0].index_TK, np.random.default_rng(0)
    index_T1[generator.random(len(made)) < busiest] = 0
    assert flagged(analysed(made), "repeats") == []
    for at in np.flatnonzero(generator.random(len(made)) < 0.4)[1:]:
        index_T1[at] = index_T1[at - 1]
    assert flagged(analysed(made), "repeats") == [0]


@pytest.mark.parametrize("names", [("code", "sums"), ("code", "sums", "empty")])
def test_the_typical_other_domain_is_another_and_has_tokens(names: tuple[str, ...]) -> None:
    made = synthetic.trace(synthetic.tokens(20, 64, domains=names[:2]), by_domain=3.0)
    made = replace(made, tokens=replace(made.tokens, domains=names))
    shares = analysed(made).streams[0].domains[0]
    assert shares.strongest is not None
    _name, expert, share = shares.strongest
    assert contrast(shares) == pytest.approx(share - shares.share_DE[:2, expert].min())


def test_a_training_is_told_from_its_checkpoints() -> None:
    made = [synthetic.trace(seed=seed) for seed in (3, 1, 1)]
    for routed, last in zip(made[0].layers, made[2].layers, strict=True):
        routed.index_TK[::2] = last.index_TK[::2]
    found = report([Study("run", {"decoder": synthetic.recording(each)}) for each in made])
    course = json.loads(json_text("s", found.to_json()))["courses"]["decoder"]
    assert course["checkpoints"] == ["run (1)", "run (2)", "run (3)"]
    for layer in range(4):
        one, two = (course["saturation"][name][layer] for name in course["checkpoints"][:2])
        assert 0.5 < one["value"] < 0.75 and two["value"] == 1 and one["chance_loads"] == pytest.approx(0.25, abs=0.01)
        assert course["fluctuation"][layer]["share_C"] == [pytest.approx(1 - one["first"]), 0]
    assert found.differences and found.differences["decoder"].tokens > 0.4, "of the first and the last"
    words = "\n".join(terminal.words(found))
    assert "Towards run (3), decoder: " in words and all(len(line) <= 80 for line in words.splitlines())
    assert "Towards run (3)</h2>" in render(found)
    assert report([Study("run", {"decoder": synthetic.recording(each)}) for each in made[:2]]).courses == {}


def test_one_domain_is_not_compared_with_itself() -> None:
    found = analysed(synthetic.trace(synthetic.tokens(domains=("all",))))
    assert "Domains" not in cards(found) and found.streams[0].separation is None


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(30, 8, 2), (300, 64, 8), (800, 16, 1), (50, 3, 2)])
def test_the_null_of_balance_is_what_a_fair_lot_gives(tokens: int, experts: int, top_k: int) -> None:
    generator = np.random.default_rng(5)
    drawn = []
    for _ in range(400):
        chosen = np.concatenate([generator.permutation(experts)[:top_k] for _ in range(tokens)])
        drawn.append(np.bincount(chosen, minlength=experts).max() / (tokens * top_k / experts) - 1)
    assert fair_max_vio(tokens, experts, top_k) == pytest.approx(np.mean(drawn), rel=0.15)
    assert fair_max_vio(tokens, experts, experts) == 0


def test_json_has_every_number_and_no_matrix() -> None:
    found = analysed(synthetic.trace(by_domain=1.0, collapsed=[1]))
    text = json_text("s", to_json(found))
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    stream = document["streams"]["decoder"]
    assert set(stream["layers"][0]) >= set(MEASURES) - {"max_vio_batch"}
    assert len(stream["vocabulary"]["input"]) == 4 and stream["paths"]["distinct"] > 1
    assert "together_EE" not in text and "count_EE" not in text


def test_two_traces_of_the_same_tokens_are_compared() -> None:
    one, same = analysed(synthetic.trace()), analysed(synthetic.trace())
    other = analysed(synthetic.trace(seed=9))
    assert compared(one, same)["decoder"].tokens == 0
    assert compared(one, other)["decoder"].tokens > 0.9


def test_counts_without_a_trace_still_have_a_verdict() -> None:
    """SGLang's `stat` recordings: what needs tokens is left out, and said."""
    whole = synthetic.trace(collapsed=[1])
    empty = whole.where(np.zeros(len(whole), bool))
    about = {"off": {"flow": "there are no tokens"}, "warnings": ["It has no tokens."]}
    found = analyse(
        "stat", {"decoder": Recording(statistics_of(whole), RoutingTrace(empty.tokens, empty.layers, about))}
    )
    assert cards(found)["Balance"].level == "poor" and "flow" in cards(found)["How sure"].detail
    assert found.streams[0].repetition == [] and "collapsed" in render(Report(found))


@settings(max_examples=15, deadline=None)
@given(
    experts=some.integers(1, 9),
    layers=some.integers(1, 3),
    documents=some.integers(1, 5),
    length=some.integers(1, 6),
    scores=some.booleans(),
    dropped=some.floats(0, 1),
    data=some.data(),
)
def test_any_shape_has_a_verdict_a_table_and_a_page(
    experts: int, layers: int, documents: int, length: int, scores: bool, dropped: float, data: some.DataObject
) -> None:
    top_k = data.draw(some.integers(1, experts))
    made = synthetic.trace(
        synthetic.tokens(documents, length), layers=layers, experts=experts, top_k=top_k, scores=scores, weights=scores
    )
    for routed in made.layers:
        routed.index_TK[np.random.default_rng(0).random(routed.index_TK.shape) < dropped] = -1
    found = Report(analysed(made))
    assert all(len(line) <= 80 for line in terminal.words(found))
    assert all(len(line) <= 80 for line in terminal.strip(found.analysis, 80))
    columns, rows = terminal.full(found)
    assert len(rows) == layers and all(len(row) == len(columns) for row in rows)
    assert "<h1>" in render(found) and json_text("s", found.to_json())


def test_statistics_of_two_streams_are_told_apart() -> None:
    recordings = {"encoder": synthetic.recording(), "decoder": synthetic.recording(synthetic.trace(collapsed=[0]))}
    found = analyse("t5", recordings)
    told = cards(found)
    assert "<h1>Layer 0 is collapsed" in render(Report(found)), "the worse of the two is the title"
    assert told["encoder: Balance"].level == "good" and told["decoder: Balance"].level == "poor"
    assert isinstance(recordings["encoder"].statistics, RoutingStatistics)
