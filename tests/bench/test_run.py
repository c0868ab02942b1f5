"""Measuring layers: rows for everybody, errors beside the times, planted faults found."""

import dataclasses
import functools
import json
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from small_layer import ROOF, SMALL

from moe_kernels import target, tuning
from moectl.bench import kernels, run
from moectl.bench.accuracy import TOLERANCE, Difference, check
from moectl.bench.inputs import Batch, Weights, make_batches, make_weights
from moectl.bench.peers import PEERS, Layer, Unavailable, build, loop, ours
from moectl.bench.roofline import ideal
from moectl.bench.routing import make
from moectl.bench.rows import Row, finish, require_good
from moectl.bench.stages import STAGES
from moectl.errors import CheckFailed, MachineError, UsageError

CPU = torch.device("cpu")
MEASURED = ("moectl", "grouped_mm", "eager", "batched_mm", "loop")


def measured(settings, **changes):
    document = run.measure(dataclasses.replace(settings, **changes))
    return document, {(row["what"], row["dtype"], row["tokens"], row["backend"]): row for row in document["rows"]}


@pytest.mark.usefixtures("roof")
def test_every_peer_is_a_row(settings):
    document, rows = measured(settings, backends=list(PEERS), tokens=[5])
    assert [row["backend"] for row in document["rows"]] == list(PEERS)
    for row in rows.values():
        assert (row["p50_ms"] is None) == (row["reason"] is not None)
        assert row["floor_ms"] > 0 and row["imbalance"] >= 1
    reasons = {name: row["reason"] for (*_, name), row in rows.items()}
    assert all(reasons[name] is None for name in MEASURED)
    for name in ("scattermoe", "megablocks", "grouped_gemm", "vllm", "tutel"):
        assert reasons[name] == f"{name} is not installed" or find_spec(name)
    assert reasons["sonicmoe"] == reasons["deepgemm"] == "it runs on CUDA only"
    json.dumps(document, allow_nan=False)


@pytest.mark.usefixtures("roof")
def test_rows_add_up(settings):
    document, rows = measured(settings, what=["fwd", "bwd", "train"], dtypes=["float32", "bfloat16"], tokens=[5])
    assert len(rows) == len(document["rows"]) == 3 * 2 * 3
    for (what, dtype, tokens, _), row in rows.items():
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["reps"] > 0
        assert row["check"] == "passed" and row["max_error"] <= TOLERANCE[dtype] and row["peak_bytes"] is None
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["p50_ms"])
        flops = {"fwd": 6, "bwd": 12, "train": 18}[what] * tokens * 2 * 32 * 16
        assert row["tflops"] == pytest.approx(flops / row["p50_ms"] / 1e9)
        assert row["speedup_over"] == "grouped_mm"
        assert row["speedup"] == pytest.approx(rows[what, dtype, tokens, "grouped_mm"]["p50_ms"] / row["p50_ms"])


def test_the_floor_is_that_of_the_routing_that_was_drawn():
    """One hot expert at one token: exactly two experts are read, whatever uniform routing would expect."""
    batches = make_batches(SMALL, 4, torch.float32, CPU, make("hot:1", SMALL), 0, False)
    drawn = [batch.counts for batch in batches]
    roof = run.machine.Roof.of("float32", ROOF, ROOF)
    row = finish(Row("small", "float32", "fwd", 4, "moectl", p50_ms=1.0), drawn, SMALL, roof)
    floors = []
    for batch in batches:
        active = len(set(batch.index_TK.flatten().tolist()))
        assert batch.active == active and batch.rows == 8
        floors.append(1000 * ideal("fwd", SMALL, 4, 8, active, 4)[0].floor(ROOF[0] * 1e12, ROOF[1] * 1e9))
    assert row.floor_ms == pytest.approx(sum(floors) / len(floors))
    assert row.imbalance == pytest.approx(4 * 6 / 8) and row.padding_waste is None
    blocks = finish(dataclasses.replace(row, block_m=16), drawn, SMALL, roof)
    expected = [1 - 8 / (16 * batch.active) for batch in batches]
    assert blocks.padding_waste == pytest.approx(sum(expected) / len(expected))


@pytest.mark.usefixtures("roof")
@pytest.mark.parametrize("what", ["fwd", "train"])
def test_a_wrong_peer_is_found_by_the_check(what, settings, plant):
    """A layer off by a thousandth of its largest value is wrong in float32."""
    plant("wrong", lambda weights: dataclasses.replace(loop.build(weights), call=_off(loop.build(weights).call)))
    document, rows = measured(settings, backends=["loop", "wrong"], tokens=[5], what=[what])
    assert rows[what, "float32", 5, "loop"]["check"] == "passed"
    assert rows[what, "float32", 5, "wrong"]["check"] == "failed"
    with pytest.raises(CheckFailed, match="wrong small float32"):
        require_good(document)
    unchecked, _ = measured(settings, backends=["wrong"], tokens=[5], what=[what], check=False)
    require_good(unchecked)


def _off(call):
    def wrong(x, index, weight):
        out = call(x, index, weight)
        return torch.cat([out[:-1], out[-1:] + 1e-3 * out.detach().abs().max()])

    return wrong


@pytest.mark.parametrize("fault", ["tokens", "routing weights", "gate_up", "down"])
def test_each_gradient_is_checked(fault):
    """A gradient off by a hundredth, of any of the four, fails the check."""
    (weights, *_), batch = _small(train=True)
    good = loop.build(weights)
    assert check(good, weights, batch, "train").good

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, value):
            return value.clone()

        @staticmethod
        def backward(_ctx, gradient):
            return 1.01 * gradient

    def call(x, index, weight):
        x = Scaled.apply(x) if fault == "tokens" else x
        weight = Scaled.apply(weight) if fault == "routing weights" else weight
        gate_up = Scaled.apply(weights.gate_up_EGD) if fault == "gate_up" else weights.gate_up_EGD
        down = Scaled.apply(weights.down_EDF) if fault == "down" else weights.down_EDF
        inner = dataclasses.replace(weights, gate_up_EGD=gate_up, down_EDF=down)
        return loop.build(inner).call(x, index, weight)

    found = check(Layer(call, (weights.gate_up_EGD, weights.down_EDF)), weights, batch, "train")
    assert not found.good and found.relative == pytest.approx(0.01, rel=0.05)


def test_a_missing_gradient_is_a_reason():
    (weights, *_), batch = _small(train=True)
    layer = loop.build(weights)
    detached = dataclasses.replace(layer, call=lambda x, index, weight: layer.call(x, index, weight.detach()))
    with pytest.raises(Unavailable, match="no gradient"):
        check(detached, weights, batch, "train")


def test_nan_is_an_infinite_error():
    difference = Difference()
    difference.add(torch.tensor([1.0, float("nan")]), torch.ones(2).double())
    difference.add(torch.ones(2), torch.ones(2).double())
    assert difference.relative == float("inf") and difference.rms == float("inf")


def _small(train: bool) -> tuple[list, Batch]:
    weights = make_weights(SMALL, torch.float32, CPU, 0, train)
    return weights, make_batches(SMALL, 9, torch.float32, CPU, make("uniform", SMALL), 0, train)[0]


@pytest.mark.parametrize("name", MEASURED)
def test_peers_take_the_weights_they_are_given(name):
    """All peers compute the same function of the same weights, without copying them."""
    (weights, *_), batch = _small(train=True)
    layer = build(name, weights)
    assert check(layer, weights, batch, "train").good
    assert [p.data_ptr() for p in layer.parameters] == [weights.gate_up_EGD.data_ptr(), weights.down_EDF.data_ptr()]


@pytest.mark.usefixtures("roof")
def test_a_peer_that_fails_is_a_row_with_the_reason(settings, plant):
    def fail(*_):
        raise RuntimeError("no kernel image (/somewhere/private.so)\nfor this device")

    plant("broken", lambda weights: Layer(fail, loop.build(weights).parameters))
    plant("huge", lambda weights: dataclasses.replace(loop.build(weights), copied=lambda tokens: tokens * 10**15))
    plant("forward_only", lambda weights: Layer(loop.build(weights).call))
    names = ["broken", "huge", "forward_only", "loop"]
    _, rows = measured(settings, backends=names, tokens=[5], what=["fwd", "train"])
    assert rows["fwd", "float32", 5, "broken"]["reason"] == "RuntimeError: no kernel image"
    assert "would copy" in rows["fwd", "float32", 5, "huge"]["reason"]
    assert rows["fwd", "float32", 5, "forward_only"]["p50_ms"] > 0
    assert rows["train", "float32", 5, "forward_only"]["reason"] == "it has no backward pass"
    assert rows["fwd", "float32", 5, "loop"]["speedup"] == pytest.approx(
        rows["fwd", "float32", 5, "forward_only"]["p50_ms"] / rows["fwd", "float32", 5, "loop"]["p50_ms"]
    )


@pytest.mark.usefixtures("roof")
def test_a_peer_that_fails_while_it_is_timed_is_a_row_with_the_reason(settings, plant):
    calls = []

    def build(weights):
        def call(*given):
            calls.append(1)
            if len(calls) > 6:
                raise RuntimeError("out of something")
            return loop.build(weights).call(*given)

        return Layer(call)

    plant("tired", build)
    _, rows = measured(settings, backends=["tired", "loop"], tokens=[5], seconds=0.02)
    assert rows["fwd", "float32", 5, "tired"]["reason"] == "RuntimeError: out of something"
    assert rows["fwd", "float32", 5, "tired"]["p50_ms"] is None and rows["fwd", "float32", 5, "loop"]["p50_ms"] > 0


@pytest.mark.usefixtures("roof")
def test_what_torch_compile_gives_up_on_is_a_reason(settings, plant, monkeypatch):
    """A list that grows with each call is compiled anew each time; eager code must not be timed in its place."""

    def restless(weights):
        seen = []

        def call(x, _index, _weight):
            seen.append(1)
            return x * len(seen)

        return dataclasses.replace(loop.build(weights), call=call)

    plant("restless", restless)
    plant("twice", lambda weights: Layer(lambda x, _index, _weight: x + len(weights.gate_up_EGD)))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=2):  # with gradients on and off
        _, rows = measured(settings, backends=["restless", "twice"], compile=True, check=False)
    for tokens in settings.tokens:
        assert "recompile_limit" in rows["fwd", "float32", tokens, "restless"]["reason"]
        assert rows["fwd", "float32", tokens, "twice"]["p50_ms"] > 0  # each cell starts anew


@pytest.mark.usefixtures("roof")
def test_what_is_measured_so_far_is_told_after_each_cell(settings):
    parts = []
    names = ["moectl", "loop"]
    document = run.measure(dataclasses.replace(settings, backends=names), on_part=parts.append)
    assert [[(row["tokens"], row["backend"]) for row in part["rows"]] for part in parts] == [
        [(1, name) for name in names],
        [(tokens, name) for tokens in (1, 5) for name in names],
    ]
    assert all(part["partial"] for part in parts) and "partial" not in document
    assert document == {key: value for key, value in parts[-1].items() if key != "partial"}


def test_training_has_row_blocks_however_small_the_batch():
    """The small-batch kernels have none, and no backward pass."""
    where = target.Target("sm_90", "a GPU that nobody has tuned")
    for train in (False, True):
        gate_up = SimpleNamespace(is_cuda=True, requires_grad=train)
        layer = ours.build(SimpleNamespace(shape=SMALL, gate_up_EGD=gate_up, down_EDF=None))
        with mock.patch.object(target, "of", lambda _: where):
            expected = tuning.choose(where, 2, SMALL.num_experts).block_m if train else None
            assert layer.block_m(2) == expected


def test_inputs_outgrow_the_cache():
    weights = make_weights(SMALL, torch.float32, CPU, 0, False)
    batches = make_batches(SMALL, 4, torch.float32, CPU, make("uniform", SMALL), 0, False)
    assert len(weights) == 8 and len(batches) == 16
    assert not torch.equal(weights[0].gate_up_EGD, weights[1].gate_up_EGD)
    assert not torch.equal(batches[0].x_TD, batches[1].x_TD)
    assert float(batches[0].x_TD.std()) == pytest.approx(1, rel=0.3)


def test_what_the_machine_cannot_do(settings):
    huge = dataclasses.replace(SMALL, hidden_size=10**6, intermediate_size=10**6)
    with pytest.raises(MachineError, match="take"):
        make_weights(huge, torch.float32, CPU, 0, False)
    if not torch.cuda.is_available():
        with pytest.raises(MachineError):
            run.measure(dataclasses.replace(settings, device="cuda"))
    with pytest.raises((MachineError, UsageError)):
        run.measure(dataclasses.replace(settings, graph=True, what=["train"]))


@pytest.mark.usefixtures("roof")
def test_stages(settings):
    parts = []
    document = kernels.measure(dataclasses.replace(settings, tokens=[5]), on_part=parts.append)
    assert parts == [document | {"partial": True}]
    expected = [name for name, stage in STAGES.items() if "cpu" in stage.devices]
    assert [row["stage"] for row in document["rows"]] == expected
    assert all(row["p50_ms"] > 0 and row["reason"] is None for row in document["rows"])
    assert {row["stage"] for row in document["rows"] if row["floor_ms"]} == {"forward", "forward, kept", "backward"}


def test_stages_of_a_gpu_are_the_kernels_that_they_say():
    """On tensors without memory, with a recorder in the place of the launches."""
    from triton.runtime.jit import JITFunction

    seen = []
    on = {"device": "meta", "dtype": torch.bfloat16}
    weights = Weights(SMALL, torch.empty(6, 32, 32, **on), torch.empty(6, 32, 16, **on))
    index = torch.empty(5, 2, dtype=torch.int64, device="meta")
    batch = Batch(torch.empty(5, 32, **on), index, torch.empty(5, 2, **on), torch.empty(5, 32, **on), [10] + [0] * 5)
    expected = {
        "up": "forward", "up, kept": "forward", "down": "forward", "combine": "combine", "dact": "activation",
        "ddown": "weight", "dx": "forward", "dx, combined": "combine", "dgate_up": "weight",
    }  # fmt: skip
    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *_, **__: seen.append(kernel.fn.__name__)),
        mock.patch.object(target, "uses_triton", lambda _: True),
        mock.patch.object(target, "of", lambda _: target.Target("sm_90", "a GPU that nobody has tuned")),
    ):
        for name in (name for name, stage in STAGES.items() if stage.devices == ("cuda",)):
            call = STAGES[name].make(weights, batch)
            seen.clear()
            call()
            assert seen == [f"{expected.pop(name)}_kernel"] and STAGES[name].work(weights, batch).nbytes > 0
    assert not expected


def test_the_roof_is_a_possible_speed():
    """Between a hundredth of and ten times what 2 cores of today do."""
    tflops, gbs = run.machine.measure_roof(torch.float32, CPU, run.machine.clock_of(CPU))
    assert 1e-3 < tflops < 5 and 0.2 < gbs < 500
