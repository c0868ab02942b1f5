"""Foreign traces: every format gives back the routing it was written from, and says what it cannot know."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from foreign import EXPERTS, LAYERS, TOP_K, choices
from safetensors.numpy import load_file, save_file
from synthetic import trace

from moectl.errors import InputError, UsageError
from moectl.routing.ingest.formats import FORMATS, read
from moectl.traces.statistics import statistics_of
from moectl.traces.store import Recording, save
from moectl.traces.trace import DECODE, PREFILL

T, PROMPT = 11, 7
INDEX = choices(T)
TOKENS = np.arange(100, 100 + T, dtype=np.int32)
PASSES = [INDEX[:PROMPT], *np.split(INDEX[PROMPT:], T - PROMPT)]


def read_all(recording: Recording) -> np.ndarray:
    """Experts [T, L, K] of a recording."""
    return np.stack([routed.index_TK for routed in recording.trace.layers], 1)


def written(name: str, folder: Path) -> tuple[Path, int]:
    """The routing in that format, and how many of its tokens it has."""
    arrays = {"first": INDEX.astype(np.int16), "first.token_ids": TOKENS}
    if name == "npy":
        np.save(folder / "one.npy", INDEX)
        return folder / "one.npy", T
    if name == "npz":
        np.savez(folder / "one.npz", **arrays)
        return folder / "one.npz", T
    if name == "safetensors":
        save_file(arrays, folder / "one.safetensors")
        return folder / "one.safetensors", T
    makers = {
        "olmoe": lambda: foreign.olmoe(folder / "code.jsonl", INDEX, TOKENS),
        "megatron": lambda: foreign.megatron(folder / "router_trace_rank0.jsonl", INDEX),
        "vllm": lambda: foreign.vllm(folder / "one.jsonl", INDEX, TOKENS, PROMPT),
        "sglang": lambda: foreign.sglang(folder / "one.jsonl", INDEX, PROMPT),
        "per_token": lambda: foreign.per_token(folder / "one.pt", INDEX, TOKENS),
        "narrow": lambda: foreign.narrow_csv(folder / "one.csv", PASSES),
        "wide": lambda: foreign.wide_csv(folder / "one.csv", PASSES),
    }
    return makers[name](), T - (name in ("vllm", "sglang"))


FORMAT = {
    "olmoe": "olmoe",
    "megatron": "megatron",
    "per_token": "sglang_recorder",
    "narrow": "llama_cpp",
    "wide": "llama_cpp",
} | dict.fromkeys(("npy", "npz", "safetensors", "vllm", "sglang"), "routed_experts")


@pytest.mark.parametrize("name", FORMAT)
def test_each_format_gives_back_the_routing_it_was_written_from(name: str, tmp_path: Path) -> None:
    path, tokens = written(name, tmp_path)
    recording = read(path, num_experts=EXPERTS, top_k=TOP_K)["decoder"]
    trace = recording.trace
    assert np.array_equal(read_all(recording), INDEX[:tokens])
    assert trace.about["format"] == FORMAT[name] and recording.sampled == 1.0
    assert [routed.point.layer for routed in trace.layers] == list(range(LAYERS))
    assert {routed.point.num_experts for routed in trace.layers} == {EXPERTS}
    counted = np.bincount(INDEX[:tokens, 0].ravel(), minlength=EXPERTS)
    assert np.array_equal(recording.statistics.loads[0].count_E, counted)
    if name in ("olmoe", "vllm", "per_token", "npz", "safetensors"):
        assert np.array_equal(trace.tokens.token_T, TOKENS[:tokens])
        assert "vocabulary" not in trace.about["off"]
    else:
        assert set(trace.tokens.token_T.tolist()) == {-1}
        assert "token ids" in trace.about["off"]["vocabulary"]
    if name in ("vllm", "sglang", "narrow", "wide"):
        assert trace.tokens.phase_T.tolist() == [PREFILL] * PROMPT + [DECODE] * (tokens - PROMPT)
    assert trace.tokens.follows_T.sum() == (0 if name == "megatron" else tokens - 1)


@pytest.mark.parametrize("name", FORMAT)
def test_the_format_named_is_the_format_recognised(name: str, tmp_path: Path) -> None:
    path, _ = written(name, tmp_path)
    named = read(path, FORMAT[name], top_k=TOP_K)["decoder"]
    assert np.array_equal(read_all(named), read_all(read(path, top_k=TOP_K)["decoder"]))


def test_a_trace_of_our_own_comes_back_whole(tmp_path: Path) -> None:
    path, _ = written("olmoe", tmp_path)
    recordings = read(path)
    save(recordings, tmp_path / "trace")
    again = read(tmp_path / "trace")["decoder"]
    assert np.array_equal(read_all(again), INDEX)
    assert again.trace.tokens.domains == ("code",)
    assert np.array_equal(again.trace.tokens.predicted_T, np.roll(TOKENS, -1))


def test_a_folder_or_a_file_is_a_domain(tmp_path: Path) -> None:
    for domain in ("code", "prose"):
        foreign.olmoe(tmp_path / "files" / f"{domain}.jsonl", INDEX, TOKENS)
        foreign.vllm(tmp_path / "folders" / domain / "one.jsonl", INDEX, TOKENS, PROMPT)
    for folder in ("files", "folders"):
        tokens = read(tmp_path / folder)["decoder"].trace.tokens
        assert tokens.domains == ("code", "prose") and tokens.domain_N.tolist() == [0, 1]


def test_vllm_text_arrays_several_choices_and_no_ids(tmp_path: Path) -> None:
    choice = {"routed_experts": foreign.npy_text(INDEX[PROMPT:]), "token_ids": None}
    record = {"choices": [choice, choice], "prompt_routed_experts": foreign.npy_text(INDEX[:PROMPT])}
    path = foreign.lines(tmp_path / "one.jsonl", [record])
    trace = read(path)["decoder"].trace
    assert trace.tokens.document_T.tolist() == [0] * T + [1] * T
    assert np.array_equal(trace.layers[1].index_TK, np.tile(INDEX[:, 1], (2, 1)))


def test_a_flat_array_is_shaped_by_facts_or_by_the_tokens_that_were_counted(tmp_path: Path) -> None:
    bare = foreign.lines(tmp_path / "bare.jsonl", [{"sgl_ext": {"routed_experts": foreign.flat(INDEX)}}])
    assert np.array_equal(read_all(read(bare, top_k=TOP_K, layers=LAYERS)["decoder"]), INDEX)
    counted = foreign.sglang(tmp_path / "counted.jsonl", INDEX, PROMPT)
    for path, top_k, message in ((bare, TOP_K, "without its shape"), (counted, 5, "no multiple of 10 tokens")):
        with pytest.raises(InputError, match=message):
            read(path, top_k=top_k)


def test_one_document_over_a_whole_file_and_a_list_of_them(tmp_path: Path) -> None:
    record = {"routed_experts": INDEX.tolist(), "domain": "sums"}
    for name, value in (("one", record), ("many", [record, record])):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(value, indent=1))
        trace = read(path)["decoder"].trace
        assert trace.tokens.domains == ("sums",) and len(trace) == T * (2 if name == "many" else 1)


@pytest.mark.parametrize("blank", [0, -1])
def test_dense_layers_and_tokens_that_were_not_recorded_are_left_out(blank: int, tmp_path: Path) -> None:
    index_TLK = choices(T, layers=4)
    index_TLK[:, 1] = blank
    index_TLK[3] = blank
    np.save(tmp_path / "one.npy", index_TLK)
    trace = read(tmp_path / "one.npy")["decoder"].trace
    assert [routed.point.layer for routed in trace.layers] == [0, 2, 3]
    assert np.array_equal(trace.layers[1].index_TK, np.delete(index_TLK[:, 2], 3, 0))
    assert trace.tokens.follows_T.sum() == T - 3, "the tokens on both sides of a missing one do not follow each other"
    assert any("dense: 1" in warning for warning in trace.about["warnings"])
    assert any("1 tokens" in warning for warning in trace.about["warnings"])


def test_the_number_of_experts_is_guessed_with_a_warning_and_never_exceeded(tmp_path: Path) -> None:
    path, _ = written("npy", tmp_path)
    recording = read(path)["decoder"]
    assert recording.trace.layers[0].point.num_experts == INDEX.max() + 1
    assert any("--num-experts" in warning for warning in recording.trace.about["warnings"])
    assert not read(path, num_experts=64)["decoder"].trace.about["warnings"]
    with pytest.raises(InputError, match="names expert 7, of 7"):
        read(path, num_experts=7)


def test_experts_in_the_order_of_their_numbers_are_no_first_choices(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.sort(choices(40), -1))
    np.save(tmp_path / "two.npy", choices(40))
    sorted_off = read(tmp_path / "one.npy")["decoder"].trace.about["off"]
    assert "order of their numbers" in sorted_off["flow"]
    assert "flow" not in read(tmp_path / "two.npy")["decoder"].trace.about["off"]


def test_megatron_ranks_are_joined_copies_read_once_and_mtp_kept_apart(tmp_path: Path) -> None:
    other = choices(T, seed=1)
    foreign.megatron(tmp_path / "router_trace_rank0.jsonl", INDEX)
    foreign.megatron(tmp_path / "router_trace_rank1.jsonl", INDEX, rank=1)
    file = foreign.megatron(tmp_path / "router_trace_rank2.jsonl", other, rank=2)
    mtp = {"step": 0, "layer": 0, "rank": 2, "num_tokens": 4, "topk": TOP_K, "mtp_idx": 0}
    file.write_text(file.read_text() + json.dumps(mtp | {"top_indices": choices(4, 2)[:, 0].tolist()}) + "\n")
    (tmp_path / "router_state_rank0.pt").write_bytes(b"a sidecar")
    streams = read(tmp_path)
    assert np.array_equal(read_all(streams["decoder"]), np.concatenate([INDEX, other]))
    assert streams["mtp"].trace.layers[0].point.role == "mtp" and len(streams["mtp"].trace) == 4
    assert any("router_trace_rank1" in warning for warning in streams["decoder"].trace.about["warnings"])


def test_megatron_micro_batches_of_a_step_are_documents(tmp_path: Path) -> None:
    file = foreign.megatron(tmp_path / "router_trace_rank0.jsonl", INDEX)
    text = file.read_text()
    foreign.megatron(file, choices(5, seed=3))
    file.write_text(text + file.read_text())
    assert read(tmp_path)["decoder"].trace.tokens.document_T.tolist() == [0] * T + [1] * 5


def test_sglang_counts_are_statistics_alone(tmp_path: Path) -> None:
    count_SLE = np.zeros((4, LAYERS + 1, EXPERTS), np.int32)
    for step, tokens in enumerate((9, 1, 4)):
        index_TLK = choices(tokens, seed=step)
        for layer in range(LAYERS):
            count_SLE[step, layer + 1] = np.bincount(index_TLK[:, layer].ravel(), minlength=EXPERTS)
    path = foreign.stat(tmp_path / "stat.pt", count_SLE)
    with pytest.raises(InputError, match="how many of 8 experts") as error:
        read(path)
    assert "multiples of 2" in error.value.fix
    recording = read(path, top_k=TOP_K)["decoder"]
    statistics = recording.statistics
    assert len(recording.trace) == 0 and recording.sampled == 0
    assert statistics.tokens == 14 and statistics.documents == 3
    assert [load.point.layer for load in statistics.loads] == [1, 2, 3]
    for layer, load in enumerate(statistics.loads, 1):
        assert np.array_equal(load.count_E, count_SLE[:, layer].sum(0)) and load.dropped == 0
    vio = np.mean([count_SLE[s, 1].max() / count_SLE[s, 1].mean() - 1 for s in range(3)])
    assert statistics.max_vio_batch[0] == pytest.approx(vio)
    assert "flow" in recording.trace.about["off"]


def test_sglang_ranks_that_record_the_same_are_read_once_and_decoded_tokens_stand_alone(tmp_path: Path) -> None:
    foreign.per_token(tmp_path / "a.pt", INDEX, TOKENS)
    dump = torch.load(foreign.per_token(tmp_path / "b.pt", INDEX, TOKENS))
    decoded = dump["records"][0] | {"forward_pass_id": 8, "extend_seq_lens": None, "forward_mode": 2}
    dump["records"].append(decoded)
    torch.save(dump, tmp_path / "b.pt")
    tokens = read(tmp_path)["decoder"].trace.tokens
    assert len(tokens) == 2 * T and tokens.document_T.max() == T
    assert tokens.phase_T.tolist() == [PREFILL] * T + [DECODE] * T


class Unsafe:
    """What a pickle may run; here it only leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_needs_more_than_tensors_is_refused_and_not_run(save, tmp_path: Path) -> None:
    save({"logical_count": Unsafe(tmp_path / "ran")}, tmp_path / "stat.pt")
    with pytest.raises(InputError, match="not loaded") as error:
        read(tmp_path / "stat.pt", top_k=TOP_K)
    assert not (tmp_path / "ran").exists() and "torch.save" in error.value.fix
    np.savez(tmp_path / "object.npz", routed_experts=np.array([Unsafe(tmp_path / "ran")], object))
    with pytest.raises(InputError, match="object"):
        read(tmp_path / "object.npz")
    assert not (tmp_path / "ran").exists()


def test_rows_of_a_sequence_prove_the_axis_order(tmp_path: Path) -> None:
    """With [T, L, K] where [T, K, L] is meant, experts of different layers would be taken for one token's."""
    record = {"input_ids": TOKENS.tolist(), "exp_ids": INDEX.tolist()}
    with pytest.raises(InputError, match="same expert twice") as error:
        read(foreign.lines(tmp_path / "wrong.jsonl", [record]))
    assert "axes" in error.value.fix


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        ("a.jsonl", [{"routed_experts": [[[1, 2]]]}, {"routed_experts": [[[1, 2], [3]]]}], "line 2: of routed_experts"),
        ("a.jsonl", [{"routed_experts": [[[0, 1.5]]]}], "whole numbers"),
        ("a.jsonl", [{"routed_experts": [[[0, -2]]]}], "number -2"),
        ("a.jsonl", [{"routed_experts": [[[0, 40_000]]]}], "of no more than 32768"),
        ("a.jsonl", [{"routed_experts": [[[0, 1]]]}, {"text": ""}], "line 2: there is no routed_experts"),
        ("a.jsonl", [{"routed_experts": [[[0, 1]]]}, {"routed_experts": [[[0, 1, 2]]]}], "2 shapes"),
        ("a.jsonl", [{"routed_experts": [[[0, 1]]], "token_ids": [1, 2, 3]}], "1 rows of experts, and 3 token ids"),
        ("a.jsonl", [{"routed_experts": "AAAA"}], "line 1: routed_experts is a flat array of 0 numbers"),
        ("a.jsonl", [{"routed_experts": "no base64"}], "no base64"),
        ("a.jsonl", [{"exp_ids": [[[1], [2]]], "input_ids": [1, 2]}], "line 1: exp_ids, input_ids"),
        ("a.jsonl", [{"exp_ids": [[[1], [2]]]}], "line 1: of exp_ids, input_ids"),
        ("a.jsonl", [{"step": 0, "layer": 1, "num_tokens": 2, "top_indices": [[1, 2]]}], "against num_tokens 2"),
        ("a.jsonl", [{"step": 0, "layer": "x", "num_tokens": 1, "top_indices": [[1, 2]]}], "layer is 'x'"),
        (
            "a.jsonl",
            [
                {"step": 0, "layer": 0, "num_tokens": 1, "top_indices": [[1, 2]]},
                {"step": 1, "layer": 1, "num_tokens": 1, "top_indices": [[1, 2]]},
            ],
            "step 0 has no layer 1",
        ),
        ("a.csv", "0,1\n0,2\n0,x\n", "line 3"),
        ("a.csv", "0,1\n0,2\n1,3\n", "choices"),
        ("a.csv", "0,1\n0,2\n0,2\n0,3\n", "4 choices stand together"),
        ("a.csv", "-1,0,1,2\n-1,1,1,2\n-1,1,1,2\n", "different positions"),
        ("a.jsonl", '{"exp_ids": [[[1], [2]]], "input_ids": [1]}\n{"exp_ids": [[[1\n', "line 2: it is not JSON"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(name: str, records: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(records, str):
        path.write_text(records)
    else:
        foreign.lines(path, records)
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert path.name in error.value.what and error.value.fix


def test_what_is_no_trace_is_refused_with_the_list_of_formats(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path / "notes.txt", tmp_path):
        with pytest.raises(InputError) as error:
            read(path)
        assert all(name in error.value.why for name in FORMATS)
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "nothing")
    with pytest.raises(UsageError, match="no format"):
        read(tmp_path, "mystery")
    with pytest.raises(UsageError, match="is 0"):
        read(tmp_path, top_k=0)
    with pytest.raises(InputError):
        read(tmp_path / "notes.txt", "olmoe")


PAGE = (Path(__file__).parents[2] / "docs" / "routing-formats.md").read_text()


def test_the_page_of_formats_names_them_all() -> None:
    assert all(f"## `{name}`" in PAGE for name in FORMATS)


def test_the_page_describes_what_is_written(tmp_path: Path) -> None:
    """Every array with its type and shape, and every key, as the page's tables have them."""
    recorded = trace(layers=1, experts=8, top_k=2)
    save({"decoder": Recording(statistics_of(recorded), recorded)}, tmp_path / "trace")
    sizes = {"T": len(recorded), "K": 2, "E": 8, "B": len(statistics_of(recorded).domain_B), "N": 24, "31": 31}
    for part in ("tokens", "layers", "statistics"):
        arrays = load_file(tmp_path / "trace" / f"decoder.{part}.safetensors")
        table = PAGE.split(f"`STREAM.{part}.safetensors`")[1].split("`STREAM.")[0]
        rows = {row[0]: row[1:] for row in re.findall(r"^\| `(?:I\.)?(\w+)` \| (\w+) \[([\w, ]+)\]", table, re.M)}
        assert set(rows) == {name.removeprefix("0.") for name in arrays}
        for name, array in arrays.items():
            kind, shape = rows[name.removeprefix("0.")]
            assert array.dtype.name == kind and array.shape == tuple(sizes[size] for size in shape.split(", "))
    document = json.loads((tmp_path / "trace" / "trace.json").read_text())
    described = document["streams"]["decoder"]
    keys = {*document, *(f".{key}" for key in described), *described["points"][0]}
    assert all(f"`{key}`" in PAGE for key in keys)
