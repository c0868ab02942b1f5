"""Floors against numbers worked out elsewhere: 790 TFLOP/s and 4.3 TB/s, bfloat16, uniform routing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moectl.bench.roofline import Work, expected_active, ideal, imbalance, kernels, padding_waste
from moectl.bench.shapes import PRESETS

FLOPS, BANDWIDTH = 790e12, 4.3e12
MS, US = 1e-3, 1e-6

# model, T, experts hit, forward, forward by kernel (training), backward, backward by kernel
TABLE = [
    ("mixtral-8x7b", 1, 2, 164 * US, 164 * US, 819 * US, 820 * US),
    ("mixtral-8x7b", 16, 7.9, 649 * US, 650 * US, 1.30 * MS, 1.31 * MS),
    ("mixtral-8x7b", 128, 8, 656 * US, 664 * US, 1.32 * MS, 1.33 * MS),
    ("mixtral-8x7b", 4096, 8, 3.65 * MS, 3.68 * MS, 7.31 * MS, 7.33 * MS),
    ("qwen3-30b-a3b", 1, 8, 17.6 * US, 17.6 * US, 299 * US, 299 * US),
    ("qwen3-30b-a3b", 16, 82.4, 181 * US, 181 * US, 462 * US, 463 * US),
    ("qwen3-30b-a3b", 128, 128, 281 * US, 285 * US, 563 * US, 568 * US),
    ("qwen3-30b-a3b", 4096, 128, 391 * US, 433 * US, 783 * US, 844 * US),
    ("qwen3-30b-a3b", 32768, 128, 3.13 * MS, 3.41 * MS, 6.26 * MS, 6.54 * MS),
    ("deepseek-v3", 1, 8, 164 * US, 164 * US, 5.41 * MS, 5.41 * MS),
    ("deepseek-v3", 128, 251.6, 5.15 * MS, 5.17 * MS, 10.4 * MS, 10.4 * MS),
    ("deepseek-v3", 4096, 256, 5.27 * MS, 5.61 * MS, 10.6 * MS, 11.1 * MS),
    ("deepseek-v3", 32768, 256, 29.2 * MS, 30.2 * MS, 58.5 * MS, 59.4 * MS),
    ("olmoe-1b-7b", 1, 8, 23.4 * US, 23.4 * US, 211 * US, 211 * US),
    ("olmoe-1b-7b", 128, 64, 188 * US, 191 * US, 376 * US, 382 * US),
    ("olmoe-1b-7b", 32768, 64, 4.18 * MS, 4.46 * MS, 8.35 * MS, 8.63 * MS),
]


@pytest.mark.parametrize(("model", "tokens", "active", "forward", "by_kernel", "backward", "backward_by_kernel"), TABLE)
def test_floors(model, tokens, active, forward, by_kernel, backward, backward_by_kernel):
    shape = PRESETS[model]
    hit = expected_active(shape.num_experts, shape.top_k, tokens)
    assert hit == pytest.approx(active, abs=0.3)
    sizes = (shape, tokens, tokens * shape.top_k, hit, 2)

    def floor(work: list[Work]) -> float:
        return sum(one.floor(FLOPS, BANDWIDTH) for one in work)

    training = [work for name, work in kernels("train", *sizes).items() if name in ("up", "down", "combine")]
    assert floor(ideal("fwd", *sizes)) == pytest.approx(forward, rel=0.01)
    assert floor(training) == pytest.approx(by_kernel, rel=0.01)
    assert floor(ideal("bwd", *sizes)) == pytest.approx(backward, rel=0.01)
    assert floor(list(kernels("bwd", *sizes).values())) == pytest.approx(backward_by_kernel, rel=0.01)
    assert floor(ideal("train", *sizes)) == pytest.approx(forward + backward, rel=0.01)


def test_bytes_flops_and_what_binds():
    """Qwen3 at 128 tokens moves 1209 MB for 9.66 GFLOP: memory; at 32768 tokens compute."""
    shape = PRESETS["qwen3-30b-a3b"]
    (few,) = ideal("fwd", shape, 128, 1024, 128, 2)
    (many,) = ideal("fwd", shape, 32768, 262144, 128, 2)
    assert (few.nbytes, few.flops) == pytest.approx((1209e6, 9.66e9), rel=1e-3)
    assert [work.bound(FLOPS, BANDWIDTH) for work in (few, many)] == ["memory", "compute"]


def test_every_flop_is_counted_once():
    sizes = (PRESETS["gpt-oss-20b"], 100, 400, 32, 2)
    for what in ("fwd", "bwd", "train"):
        assert sum(work.flops for work in kernels(what, *sizes).values()) == sum(w.flops for w in ideal(what, *sizes))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.sampled_from([1, 16, 128]))
def test_padding_and_imbalance(counts, block):
    padded = sum(len(range(0, count, block)) * block for count in counts)
    assert padding_waste(counts, block) == pytest.approx(1 - sum(counts) / padded if padded else 0)
    assert 0 <= padding_waste(counts, block) < 1 and (block > 1 or padding_waste(counts, block) == 0)
    assert 1 <= imbalance(counts) <= len(counts)
