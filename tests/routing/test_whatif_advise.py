"""Advice: it says what the what-ifs found, changes where the machine's limits are, and its commands find the same."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import random_trace, trace, traces

from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, UsageError
from moectl.routing.whatif.advise import Advice, advise
from moectl.routing.whatif.finding import Finding
from moectl.routing.whatif.machine import Machine, Model, facts, parse_link
from moectl.routing.whatif.registry import find
from moectl.traces.trace import RoutingTrace

LAYERS, EXPERTS = 2, 16


def skewed(strength: float, seed: int = 0) -> RoutingTrace:
    """Experts of a domain are busier the lower their number; two domains that begin at different experts."""
    generator = np.random.default_rng(seed)
    domain_T = np.repeat(np.arange(8) % 2, 250)
    number_E = np.arange(EXPERTS)
    log_TE = -strength * ((number_E + 8 * domain_T[:, None]) % EXPERTS) / EXPERTS
    index = [np.argsort(-(log_TE + generator.gumbel(size=log_TE.shape)), axis=1)[:, :2] for _ in range(LAYERS)]
    return trace(index, EXPERTS, lengths=[250] * 8, domain_N=[0, 1] * 4, domains=("a", "b"))


def topics(advice: Advice) -> list[str]:
    return [step.topic for step in advice.steps]


@pytest.mark.parametrize(
    ("text", "rate"),
    [("50GB/s", 50), ("400Gb/s", 50), ("400 Gbit/s", 50), ("1.6TB/s", 1600), ("900MB/s", 0.9), ("1GiB/s", 2**30 / 1e9)],
)
def test_rates(text: str, rate: float) -> None:
    assert parse_link(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["50", "50GB", "GB/s", "0GB/s", "-1GB/s", "50gb/s", "1e9B/s"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(UsageError, match="is no rate"):
        parse_link(text)


def test_what_a_checkpoint_says_of_itself() -> None:
    sizes = {"model.layers.0.mlp.experts.gate_up_proj": 600, "model.layers.0.mlp.experts.1.down_proj.weight": 400}
    sizes |= {"model.layers.0.mlp.shared_expert.up_proj.weight": 30, "model.embed_tokens.weight": 20}
    tensors = {name: TensorRef(name, "BF16", (size // 2,), Path("x"), 0, size) for name, size in sizes.items()}
    config = {"model_type": "x", "text_config": {"hidden_size": 64}}
    found = facts(Checkpoint(Path(), "x", None, config, tensors, {}))
    assert found == Model(1000 / 1e9, 50 / 1e9, 64)
    assert facts(Checkpoint(Path(), "x", None, config, tensors, {}), 0.5) == Model(500 / 1e9, 50 / 1e9, 64)


def test_uneven_loads_are_repacked_and_even_ones_left() -> None:
    machine = Machine(4, 80, 50)
    even, uneven = advise(skewed(0), machine), advise(skewed(4), machine)
    assert (even.chosen["placement"], even.chosen["replicas"]) == ("contiguous", 0)
    assert uneven.chosen["placement"] in ("repacked", "replicated")
    before, after = (uneven.chosen["imbalance"][name] for name in ("before", "after"))
    assert before > after + 0.3
    text = next(step.text for step in uneven.steps if step.topic == "placement")
    assert f"{before:.2f}" in text and f"{after:.2f}" in text
    columns, mean = uneven.findings["placement"].columns, uneven.findings["placement"].rows[LAYERS]
    assert mean[columns.index("contiguous")] == before
    assert mean[columns.index(uneven.chosen["placement"])] == after


def test_one_expert_above_a_gpus_share_gets_replicas_where_there_is_room() -> None:
    generator = np.random.default_rng(0)
    index = np.where(generator.random((1, 4000, 1)) < 0.5, 0, generator.integers(0, 8, (1, 4000, 1)))
    found = trace(index, 8, lengths=[500] * 8)
    roomy = advise(found, Machine(4, 80, 50), Model(8, 0, 64))
    assert roomy.chosen["placement"] == "replicated" and roomy.chosen["replicas"] > 0
    assert roomy.chosen["imbalance"]["after"] < 1.2
    full = advise(found, Machine(4, 2 / 0.7, 50), Model(8, 0, 64))
    assert (full.chosen["slots_per_gpu"], full.chosen["replicas"]) == (2, 0)
    assert full.chosen["imbalance"]["after"] > 2


def test_what_does_not_fit_is_cached() -> None:
    """16 experts of 2 layers, 1 GB each: 32 GB, on 2 GPUs of 16 GB and of a little less."""
    model, traced = Model(32, 4, 64), skewed(2)
    fits = advise(traced, Machine(2, 20, 50, reserved=0.0), model)
    assert (fits.chosen["fits"], fits.chosen["slots_per_gpu"], fits.chosen["cache"]) == (True, 8, None)
    short = advise(traced, Machine(2, 19.9, 50, reserved=0.0), model)
    assert (short.chosen["fits"], short.chosen["slots_per_gpu"]) == (False, 7)
    cached = short.chosen["cache"]
    assert cached["experts_of_a_layer"] == 14
    assert cached["hit_rate"] == short.findings["cache"].detail["hit_rate"]["LRU"][14]
    missed_gb = 4 * (1 - cached["hit_rate"])
    assert cached["tokens_per_s_at_most"] == pytest.approx(2 * 25 / missed_gb)
    assert topics(short) == ["memory", "cache", "capacity", "traffic"]
    assert "Keep 14 experts" in short.summary
    none = advise(traced, Machine(2, 4.5, 50, reserved=0.0), model)
    assert topics(none) == ["memory", "capacity", "traffic"]
    assert "larger GPUs" in none.summary


def test_traffic_by_hand() -> None:
    """Each token goes to experts 0 and 15: one GPU of two is its own, so one feature vector leaves and comes back."""
    traced = trace([np.tile([0, EXPERTS - 1], (64, 1))] * LAYERS, EXPERTS, lengths=[8] * 8)
    found = advise(traced, Machine(2, 80, 50), Model(1, 1, 512))
    assert found.chosen["tokens_per_s_and_gpu"] == pytest.approx(50e9 / (LAYERS * 2 * 512 * 2))
    nodes = advise(traced, Machine(4, 80, 50, nodes=2), Model(1, 1, 512))
    busiest = nodes.chosen["imbalance"]["after"]
    assert 1 <= busiest < 2
    assert nodes.chosen["tokens_per_s_and_gpu"] == pytest.approx(50e9 / (LAYERS * 2 * 512 * 2) / busiest)
    assert "nodes" in next(step.text for step in nodes.steps if step.topic == "traffic")


def test_more_gpus_than_experts_are_filled_with_copies_and_counted() -> None:
    """Eight even experts on 64 GPUs leave 56 idle, which chance does not excuse."""
    index = np.argsort(np.random.default_rng(0).random((LAYERS, 2000, 8)), axis=2)[..., :2]
    found = advise(trace(index, 8, lengths=[100] * 20), Machine(64, 80, 50, nodes=8), Model(1, 1, 64))
    assert (found.chosen["placement"], found.chosen["replicas"]) == ("replicated", 56)
    assert found.chosen["imbalance"]["before"] > 8 and found.chosen["imbalance"]["after"] < 1.3
    assert "56 replicas" in found.summary
    assert found.chosen["balanced"] and "balance" not in topics(found)


def test_a_collapsed_router_is_told_first_and_no_capacity_is_advised() -> None:
    """Of 16 experts two have all, which is eight times an even share."""
    found = advise(trace([np.tile([3, 7], (640, 1))] * LAYERS, EXPERTS, lengths=[80] * 8), Machine(4, 80, 50))
    assert topics(found)[0] == "balance" and not found.chosen["balanced"]
    assert "as if 2 of 16 experts" in found.steps[0].text and "14 of them get nothing" in found.steps[0].text
    assert found.chosen["capacity_factor"] == pytest.approx(7.93, abs=0.02)
    assert "capacity factor" not in found.summary
    assert "would have to be 7.9" in next(step.text for step in found.steps if step.topic == "capacity")


def test_few_tokens_for_many_gpus_leave_the_modelled_times_out() -> None:
    assert "parallelism" not in topics(advise(random_trace(0, [20], 64, 2), Machine(32, 80, 50), Model(1, 1, 64)))


def again(command: str, traced: RoutingTrace) -> Finding:
    """What the command of a step finds."""
    name, _, written = command.split("--what-if ")[1].partition(":")
    module = find(name).load()
    types = {each.name: type(getattr(module.Options(), each.name)) for each in fields(module.Options)}
    given: dict[str, Any] = {}
    for part in written.split(",") if written else ():
        key, value = part.split("=")
        given[key] = value == "True" if types[key] is bool else types[key](value)
    found: Finding = module.run(traced, module.Options(**given))
    return found


def test_commands_find_the_same() -> None:
    traced, compared = skewed(3), 0
    for machine, model in ((Machine(4, 80, 50), Model(32, 4, 64)), (Machine(2, 20, 50), Model(32, 4, 64))):
        found = advise(traced, machine, model)
        for step in found.steps:
            if "--what-if" in step.command:
                name = step.command.split("--what-if ")[1].partition(":")[0]
                assert again(step.command, traced).rows == found.findings[name].rows
                compared += 1
    assert compared == 7


def test_steps_are_complete() -> None:
    for step in advise(skewed(3), Machine(4, 80, 50), Model(32, 4, 64)).steps:
        assert any(letter.isdigit() for letter in step.text)
        assert step.text.endswith(".") and step.assumption.endswith(".")
        assert step.command.startswith("moectl ")


@settings(max_examples=10, deadline=None)
@given(traces(least_tokens=4), st.sampled_from([1, 2, 4]), st.sampled_from([None, 0.001, 1, 100, 10_000]))
def test_any_trace(found: RoutingTrace, gpus: int, experts_gb: float | None) -> None:
    got = advise(found, Machine(gpus, 80, 50), Model(experts_gb, 1, 64))
    assert got.summary.endswith(".")
    assert topics(got)[0] in ("memory", "balance")


def test_what_is_refused() -> None:
    for wrong in ({"gpus": 0}, {"gpus": 3, "nodes": 2}, {"gpu_memory_gb": 0}, {"link_gb_per_s": 0}, {"reserved": 1}):
        with pytest.raises(UsageError, match="no machine"):
            Machine(**{"gpus": 2, "gpu_memory_gb": 80, "link_gb_per_s": 50} | wrong)
    with pytest.raises(InputError, match="no tokens"):
        advise(random_trace(0, [0], 4, 1), Machine(2, 80, 50))
