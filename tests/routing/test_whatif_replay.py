"""Replaying other routers on a trace: the model's own gives what the model did, and all numbers are counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import random_trace, trace

from moectl.errors import InputError, UsageError
from moectl.routers.protocol import Routing
from moectl.routers.spelling import parse
from moectl.routing.whatif import rerouting as module
from moectl.routing.whatif.replay import replay
from moectl.routing.whatif.rerouting import batches


def softmaxed(seed: int, tokens: int, experts: int, top_k: int, *, lengths=None, probabilities=False):
    """A trace of a model that normalises the weights of the top-k of a softmax, and whose scores have no ties."""
    generator = np.random.default_rng(seed)
    score = generator.permuted(np.tile(np.arange(experts) / 4, (2, tokens, 1)), axis=2)
    index = np.argsort(-score, axis=2)[..., :top_k]
    chosen = np.exp(np.take_along_axis(score, index, 2))
    if probabilities:
        score = np.exp(score) / np.exp(score).sum(2, keepdims=True)
    kind = "probabilities" if probabilities else "logits"
    weight = chosen / chosen.sum(2, keepdims=True)
    return trace(index, experts, weight_LTK=weight, score_LTE=score, score_kind=kind, lengths=lengths)


def row(found, name):
    return dict(zip(found.columns, next(row for row in found.rows if row[0] == name), strict=True))


@pytest.mark.parametrize("probabilities", [False, True])
def test_the_models_own_router_gives_what_the_model_did(probabilities):
    found = replay(softmaxed(0, 60, 8, 3, probabilities=probabilities), parse("mixtral"))
    again, own = row(found, "mixtral"), row(found, "the model")
    assert again["overlap"] == 1 and again["mass moved"] < 1e-3 and again["dropped"] == 0
    for name in ("experts per token", "max vio", "effective experts", "overlap by chance"):
        assert again[name] == pytest.approx(own[name])


def test_a_top_1_router_stays_one_and_others_take_as_many_as_the_model():
    found = replay(softmaxed(1, 60, 8, 3), parse("switch:cf=0,olmoe,olmoe:k=2"))
    assert [row(found, name)["experts per token"] for name in ("switch:cf=0", "olmoe", "olmoe:k=2")] == [1, 3, 2]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_numbers_are_those_of_counting(seed, lengths):
    traced = random_trace(seed, lengths, 6, 2, dropped=0.2)
    found = replay(traced, parse("gshard:cf=0.75,batch_tokens=8"), seed=0)
    named = parse("gshard:cf=0.75")[0]
    overlaps, moved, dropped, wanted = [], [], 0, 0
    for routed in traced.layers:
        router = named.entry.load()(None, 6, named.options(top_k=2)).eval()
        for rows in batches(traced.tokens, 8):
            score = torch.from_numpy(routed.score_TE[rows].astype(np.float32))
            done = router.route(score, module.Context(generator=torch.Generator().manual_seed(0)))
            dropped += int(done.dropped_TK.sum())
            wanted += int(done.dropped_TK.sum() + (done.index_TK >= 0).sum())
            for at in range(len(score)):
                model = {
                    e: float(w)
                    for e, w in zip(routed.index_TK[rows][at].tolist(), routed.weight_TK[rows][at], strict=True)
                    if e >= 0
                }
                other = {
                    e: float(w) for e, w in zip(done.index_TK[at].tolist(), done.weight_TK[at], strict=True) if e >= 0
                }
                overlaps.append(len(model.keys() & other.keys()) / len(model) if model else 0.0)
                shares = [{e: w / sum(each.values()) for e, w in each.items()} for each in (model, other)]
                moved.append(sum(abs(shares[0].get(e, 0) - shares[1].get(e, 0)) for e in range(6)) / 2)
    got = row(found, "gshard:cf=0.75,batch_tokens=8")
    assert got["overlap"] == pytest.approx(np.mean(overlaps), abs=1e-6)
    assert got["mass moved"] == pytest.approx(np.mean(moved), abs=1e-4)
    assert got["dropped"] == pytest.approx(
        np.mean([each["dropped"] for each in found.detail["gshard:cf=0.75,batch_tokens=8"]])
    )
    assert sum(each["dropped"] for each in found.detail["gshard:cf=0.75,batch_tokens=8"]) > 0 or not dropped


def test_the_overlap_by_chance_is_that_of_random_routers():
    """Scores that say nothing of what the model did."""
    generator = np.random.default_rng(0)
    index = np.argsort(generator.random((1, 20_000, 16)), axis=2)[..., :4]
    traced = trace(index, 16, score_LTE=generator.normal(size=(1, 20_000, 16)))
    got = row(replay(traced, parse("olmoe:k=2")), "olmoe:k=2")
    assert got["overlap by chance"] == 2 / 16 and got["overlap"] == pytest.approx(2 / 16, abs=0.005)
    assert got["mass moved"] is None


@pytest.mark.parametrize("longest", [1, 10, 20, 40])
@pytest.mark.parametrize("lengths", [[3, 4, 2, 9, 30, 1], [50], [1] * 20, [0, 12, 0, 0, 25, 3, 0]])
def test_batches_hold_all_tokens_and_whole_documents_where_these_fit(monkeypatch, longest, lengths):
    """A batch of more than one document has 10 tokens at most; a document is cut where it has more than both bounds."""
    monkeypatch.setattr(module, "LONGEST", longest)
    traced = random_trace(0, lengths, 4, 1)
    found = list(batches(traced.tokens, 10))
    assert [at for rows in found for at in range(rows.start, rows.stop)] == list(range(sum(lengths)))
    bound = max(longest, 10)
    pieces = dict.fromkeys(range(len(lengths)), 0)
    for rows in found:
        inside = np.unique(traced.tokens.document_T[rows])
        assert rows.stop - rows.start <= (10 if len(inside) > 1 else bound)
        for document in inside.tolist():
            pieces[document] += 1
    assert pieces == {document: -(-length // bound) for document, length in enumerate(lengths)}
    assert module.cut_documents(traced.tokens, 10) == sum(length > bound for length in lengths)


@pytest.mark.parametrize("router", ["mone", "switch:sequence_room=3"])
def test_routers_by_sequence_see_whole_documents_however_many_tokens_are_routed_together(router):
    traced = random_trace(0, [30, 0, 5, 21, 9], 4, 1)
    sep = "," if ":" in router else ":"
    found = replay(traced, parse(f"{router},{router}{sep}batch_tokens=10"))
    whole, small = list(found.detail.values())[1:]
    assert whole == small and any(layer["overlap"] < 1 for layer in whole)


def test_documents_that_are_cut_are_said(monkeypatch):
    traced = random_trace(0, [30, 5, 21], 4, 1)
    assert not any("pieces" in text for text in replay(traced, parse("mone:batch_tokens=10")).assumptions)
    monkeypatch.setattr(module, "LONGEST", 20)
    found = replay(traced, parse("mone:batch_tokens=10,mone:batch_tokens=25"))
    assert [text.split(" longer")[0] for text in found.assumptions if "pieces" in text] == ["2 documents are"]


def test_biases_move_in_training_and_balance_what_is_unbalanced():
    generator = np.random.default_rng(0)
    score = generator.normal(size=(1, 6000, 8)) + np.linspace(0, 2, 8)
    traced = trace(np.argsort(-score, axis=2)[..., :2], 8, score_LTE=score, scoring="sigmoid", lengths=[50] * 120)
    found = replay(traced, parse("loss-free:bias_rate=0.02,training=yes,batch_tokens=100,loss-free"))
    learning, use = (
        row(found, name) for name in ("loss-free:bias_rate=0.02,training=yes,batch_tokens=100", "loss-free")
    )
    assert learning["max vio"] < 0.5 * use["max vio"]


def test_a_count_that_is_wrong_is_seen(monkeypatch):
    """The test of the model's own router fails if weights are compared without being normalised."""

    def planted(model, weight, done: Routing, experts):
        return torch.ones(len(model)) * 0.01

    monkeypatch.setattr(module, "_moved", planted)
    with pytest.raises(AssertionError):
        test_the_models_own_router_gives_what_the_model_did(False)


@pytest.mark.parametrize("name", ["x-moe", "soft-moe", "mmoe"])
def test_what_no_trace_holds_is_refused(name):
    with pytest.raises(UsageError, match="cannot be replayed"):
        replay(softmaxed(0, 10, 8, 2), parse(name))


def test_more_experts_than_there_are_and_no_scores_are_refused():
    with pytest.raises(UsageError, match="cannot be replayed on 8 experts"):
        replay(softmaxed(0, 10, 8, 2), parse("olmoe:k=9"))
    with pytest.raises(InputError, match="no scores"):
        replay(trace(np.zeros((1, 3, 1)), 4), parse("mixtral"))


def test_routers_of_domains_and_of_words_know_the_trace():
    traced = random_trace(3, [9, 12, 8], 6, 2, domains=3)
    names = ["demix", "task-level", "hash", "multihash", "thor", "limoe:training=yes", "uni-perceiver"]
    found = replay(traced, parse(",".join(names)))
    assert [row[0] for row in found.rows][1:] == names
    assert row(found, "limoe:training=yes")["dropped"] > 0  # one expert each, and hardly more room than tokens
    alike, by_task = row(found, "uni-perceiver"), row(found, "task-level")  # a domain is both its task and modality
    assert {**alike, "router": ""} == {**by_task, "router": ""}
