"""The summary of a compression: its numbers by hand, and words that follow from them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from made_reports import EXPERTS, HIDDEN, HOSTILE, LAYERS, WIDTH, made, measured, reports, sizes

from moectl.codecs import rate
from moectl.codecs.blob import pack
from moectl.compress.pipeline.report import LayerReport, MatrixReport
from moectl.compress.report.findings import Finding, findings
from moectl.compress.report.summary import layers, stored_for, summary
from moectl.compress.report.words import MOST_LAYERS, terminal, to_json


def serious(found: list[Finding]) -> list[str]:
    return [each.what for each in found if each.serious]


def test_an_expert_is_its_matrices_weighted_by_their_weights() -> None:
    (layer, *_) = layers(reports())
    for number, expert in enumerate(layer.experts):
        up, down = 2 * WIDTH * HIDDEN, WIDTH * HIDDEN
        zeros = ((0.8 + 0.01 * number) * up + (0.85 + 0.01 * number) * down) / (up + down)
        assert expert.zeros == pytest.approx(zeros)
        assert expert.zeros != pytest.approx(0.825 + 0.01 * number), "planted: matrices of different sizes alike"
        assert expert.tokens == 200 + 10 * number and not (expert.cold or expert.fallback or expert.thin)
    assert layer.tokens == (200, 225, 250) and layer.label == "0" and len(layer.experts) == EXPERTS


def test_every_byte_is_for_something() -> None:
    found = made().stored
    assert sum(found.values()) == sum(sizes().values())
    matrices = 2 * LAYERS
    assert found["codes"] == 5000 * matrices and found["levels"] == 800 * matrices
    assert found["counts"] == 416 * matrices and found["embeddings"] == 1000 and found["rest"] == 10 + 300 * LAYERS


def test_experts_of_other_formats_are_told_from_the_dense_part() -> None:
    names = {
        "layers.0.experts.w1.packed": 1,
        "layers.0.experts.w1.scales": 2,
        "layers.0.experts.w1.zeros": 4,
        "layers.0.experts.0.w2.weight_packed": 8,
        "layers.0.experts.0.w2.weight_scale": 16,
        "layers.0.attn.o_proj.weight_packed": 32,
        "layers.0.shared_experts.w1.weight_packed": 128,
        "shared.weight": 64,
    }
    found = stored_for(names, {"layers.0.experts.w1"})
    assert found == {"codes": 1 + 8, "levels": 2 + 4 + 16, "embeddings": 64, "rest": 32 + 128}


def test_the_rate_is_that_of_the_blobs() -> None:
    random = np.random.default_rng(0)
    trits = random.choice(np.array([-1, 0, 0, 0, 0, 0, 1], np.int8), (4, 64, 128))
    blob = pack(trits, np.ones((4, 64, 2), ml_dtypes.bfloat16), "e")
    exact = rate.measure(blob, trits)
    own = [
        MatrixReport("e", i, 64, 128, 9, 900, float((trits[i] == 0).mean()), 0.1, 1.0, 1.0, False, False)
        for i in range(4)
    ]
    tensors = {name: tensor.nbytes for name, tensor in blob.tensors().items()}
    facts = {"source_bytes": 1, "weight_bytes": 1, "ratio": 1, "bits_per_parameter": 1, "bits_per_expert_parameter": 1}
    found = summary("m", [LayerReport(0, "l.0", tuple(own), 1.0)], facts, {"bits": None}, tensors, {"e"}).rate
    assert found is not None
    assert found.codes == exact.codes and found.weights == exact.weights
    assert found.rows == pytest.approx(exact.rows, abs=8 * 16 / trits.size)  # `about`
    assert found.entropy == pytest.approx(exact.entropy, abs=2e-3)  # signs as they fell, zeros matrix by matrix
    assert found.headroom == pytest.approx(exact.headroom, abs=2e-3)


def test_labels_tell_encoder_from_decoder() -> None:
    one = reports()[0]
    both = [replace(one, name="encoder.block.1", index=1), replace(one, name="decoder.block.1", index=4)]
    assert [layer.label for layer in layers(both)] == ["encoder 1", "decoder 1"]
    assert [layer.label for layer in layers(both[:1])] == ["1"]


def test_nothing_stands_out_of_a_sound_model() -> None:
    assert serious(findings(made())) == []


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"cold": True, "tokens": 3}, {}, "1 of 24 experts, in 1 layer, were given too few tokens"),
        ({"fallback": True}, {}, "Hessians of 1 of 24 experts"),
        ({}, {"measured": measured(2.5)}, "code lost much: its loss rose by 25%"),
        ({}, {"measured": measured(2.16)}, "code lost more than other text: 8.0%, 3.0% at the median"),
        ({}, {"measured": measured(rerouted=0.5)}, "53% of the tokens take other experts than before in layer 3"),
        ({}, {"measured": None}, "Quality was not measured"),
    ],
)
def test_what_is_planted_stands_out(changes: dict[str, Any], more: dict[str, Any], words: str) -> None:
    found = serious(findings(made(reports(**changes), **more)))
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"looked_at": HIDDEN - 1}, {}, "1 of 24 experts were calibrated on fewer tokens than they have inputs"),
        ({"error": 3.0}, {}, "Layer 2 has"),
        ({}, {"sizes": sizes() | {"model.norm.weight": 10**6}}, "% of the bytes are not experts'"),
        ({}, {}, "20% of the experts' bytes are what each row takes"),
    ],
)
def test_what_is_worth_knowing_is_said_too(changes: dict[str, Any], more: dict[str, Any], words: str) -> None:
    assert any(words in each.what for each in findings(made(reports(**changes), **more)) if not each.serious)


def test_json_has_everything_and_is_json() -> None:
    found = json.loads(json.dumps(to_json(made()), allow_nan=False))
    assert [layer["layer"] for layer in found["layers"]] == ["0", "1", "2", "3"]
    assert found["layers"][3]["rerouted"] == pytest.approx(0.13) and len(found["layers"][0]["experts"]) == EXPERTS
    assert found["rate"]["achieved"] == pytest.approx(found["rate"]["codes"] + found["rate"]["rows"])
    assert found["measured"]["domains"]["code"]["drift"]["kl"] == 0.08
    assert json.loads(json.dumps(to_json(made(measured=None, recipe={"bits": 4}))))["measured"] is None


def test_layers_as_json_do_not_depend_on_the_clock() -> None:
    slower = [replace(report, seconds=99.0) for report in reports()]
    assert [layer.to_json() for layer in layers(slower)] == [layer.to_json() for layer in layers(reports())]


def test_a_terminal_of_80_columns_shows_layers_sizes_domains_and_findings() -> None:
    lines = terminal(made(reports(cold=True)))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for words in ("rerouted", "12.0%", "bits per expert weight", "entropy", "code", "2.1000", "! 1 of 24", "1 GB"):
        assert words in text
    assert text.count("\n2 ") == 1 and "\x1b" not in "\n".join(terminal(made(measured=measured(domain=HOSTILE))))


def test_a_long_model_shows_its_ends() -> None:
    one = reports()[0]
    many = [replace(one, index=index, name=f"model.layers.{index}") for index in range(100)]
    lines = terminal(made(many))
    shown = [line.split()[0] for line in lines if line and line[0].isdigit()]
    assert shown[:12] == [str(index) for index in range(12)] and shown[12:24] == [
        str(index) for index in range(88, 100)
    ]
    assert sum(line == "..." for line in lines) == 1 and MOST_LAYERS == 24


def test_entropy_is_in_bits() -> None:
    found = made().rate
    assert found is not None and 0 < found.entropy < math.log2(3)
