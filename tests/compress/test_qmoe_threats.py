"""What goes wrong while a model is compressed: it is killed, interrupted, or the disk, the model or the text is bad.

Whenever it ends, the source is as it was, the output is absent or whole, and the same command comes to the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from qmoe_runs import (
    COUNTING,
    LAYERS,
    SMALL,
    Ended,
    compress,
    made_moe,
    memory,
    names,
    program,
    started,
    strict,
    texts,
    words,
)
from safetensors.torch import load_file, save_file
from trees import tree
from typer.testing import CliRunner

import moectl.integrations.transformers as ours
from moectl.checkpoint.fs import FileSystem
from moectl.cli.main import app
from moectl.compress import qmoe_job
from moectl.compress.pipeline import preflight
from moectl.compress.pipeline import run as pipeline
from moectl.compress.pipeline import settings as pipeline_settings
from moectl.compress.quantise.method import method
from moectl.errors import InputError, MachineError
from moectl.families.tiny import tiny_model
from moectl.layerwise.quiet import quiet

EFFECTS = ("create", "write", "copy", "sync", "rename", "rename_new", "remove", "remove_tree")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A model and text that tests leave as they are, and what becomes of them undisturbed."""
    with memory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "_SPEED_SECONDS", 0.0)
        patch.setattr(pipeline_settings, "MICRO_BATCH_TOKENS", 64)  # so that there are several micro-batches
        made_moe(directory / "moe")
        texts(directory / "counting.jsonl", COUNTING)
        for out in ("clean", "again"):  # here, so that every fork begins with what it has to import
            done = CliRunner().invoke(app, asked(directory, directory / out / "q"))
            assert done.exit_code == 0, done.exception
        assert tree(directory / "again") == tree(directory / "clean")
        yield directory


@pytest.fixture(scope="module")
def clean(place: Path) -> dict[str, str]:
    return tree(place / "clean" / "q")


@pytest.fixture
def room() -> Iterator[Path]:
    """Where outputs go."""
    with memory() as directory:
        yield directory


def asked(place: Path, out: Path, *options: Any) -> list[str]:
    """The command in several shards, for they take the writer several effects."""
    return words(place / "moe", out, *SMALL, "--shard-size", "50kB", *options, data=place / "counting.jsonl")


def resumed(place: Path, room: Path, clean: dict[str, str]) -> None:
    """The same command ends in the bytes of an undisturbed run, and leaves nothing else."""
    assert not (room / "q").exists() or tree(room / "q") == clean
    done = program(asked(place, room / "q"))
    assert (done.code, done.stdout) == (0, f"{room / 'q'}\n"), done.stderr
    assert tree(room / "q") == clean and names(room) == ["q"]


# ---- killed, interrupted, failing ---------------------------------------------------------------------------

EFFECTS = ("create", "write", "copy", "sync", "rename", "rename_new", "remove", "remove_tree")


def around_effects(around: Callable[[str, tuple[Any, ...], Callable[[], Any]], Any]) -> None:
    """Let everything that this process does to files go through `around`: what it is, and what does it."""
    for verb in EFFECTS:
        inner = getattr(FileSystem, verb)

        def effect(self: FileSystem, *given: Any, verb: str = verb, inner: Any = inner) -> Any:
            return around(verb, given, lambda: inner(self, *given))

        setattr(FileSystem, verb, effect)


def at_effect(number: int, act: Callable[[], Any]) -> Callable[[], None]:
    """Something is done before an effect."""
    left = [number]

    def around(_verb: str, _given: tuple[Any, ...], effect: Callable[[], Any]) -> Any:
        left[0] -= 1
        if left[0] == 0:
            act()
        return effect()

    return lambda: around_effects(around)


def at_file(pattern: str, act: Callable[[], Any], *, before: bool = False) -> Callable[[], None]:
    """Something is done when a file or directory is given its name, before or after."""

    def around(verb: str, given: tuple[Any, ...], effect: Callable[[], Any]) -> Any:
        here = verb == "rename" and Path(given[1]).match(pattern)
        if here and before:
            act()
        result = effect()
        if here and not before:
            act()
        return result

    return lambda: around_effects(around)


def signalled(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail(code: int) -> None:
    raise OSError(code, os.strerror(code))


def test_killed_again_and_again_it_comes_to_the_same_bytes(
    place: Path, room: Path, clean: dict[str, str], record_property: Callable[[str, object], None]
) -> None:
    """Each time a few effects later than the last: in layers, between them, in shards, and while it is published."""
    effects = 4
    while (done := program(asked(place, room / "q"), at_effect(effects, signalled(signal.SIGKILL)))).code:
        assert done.code == -signal.SIGKILL, done.stderr
        assert not (room / "q").exists() or tree(room / "q") == clean
        effects += 6
    resumed(place, room, clean)
    assert effects > 40
    record_property("kills of compress qmoe", effects // 6)


def test_killed_before_and_after_every_boundary(place: Path, room: Path, clean: dict[str, str]) -> None:
    files = [f"layer-{layer:05d}.safetensors" for layer in range(LAYERS)]
    for name in (*files, "rest.safetensors", "model-00002-*.safetensors", "q"):
        for before in (True, False):
            done = program(asked(place, room / "q"), at_file(name, signalled(signal.SIGKILL), before=before))
            assert done.code == -signal.SIGKILL, (name, before)
            assert (room / "q").exists() == ((name, before) == ("q", False))
    resumed(place, room, clean)


def test_what_another_command_has_begun_is_refused_before_the_work(
    place: Path, room: Path, clean: dict[str, str]
) -> None:
    """And with an export, whose files the writer reads are made anew, its own command goes on with it."""
    export = ("--export", "w4a16", "--group-size", "32")
    killed = program(asked(place, room / "q", *export), at_file("model-00002-*", signalled(signal.SIGKILL)))
    assert killed.code == -signal.SIGKILL and "q.partial" in names(room)
    refused = program(asked(place, room / "q"), at_file("*", lambda: fail(errno.EIO)))
    assert refused.code == 2 and "q.partial holds the unfinished output of another command" in refused.stderr
    for out in ("q", "other"):
        assert program(asked(place, room / out, *export)).code == 0
    assert tree(room / "q") == tree(room / "other") and names(room) == ["other", "q"]
    assert program(asked(place, room / "q", "--overwrite")).code == 0
    assert tree(room / "q") == clean


def test_killed_at_random_moments(place: Path, room: Path, clean: dict[str, str]) -> None:
    choose = random.Random(0)
    for _ in range(3):
        process = started(asked(place, room / "q"))
        time.sleep(choose.uniform(0.02, 0.5))
        os.kill(process.number, signal.SIGKILL)
        process.wait()
    resumed(place, room, clean)


@pytest.mark.parametrize(
    ("number", "code", "where"),
    [(signal.SIGTERM, 143, "layer-00001.safetensors"), (signal.SIGINT, 130, "model-00002-*.safetensors")],
)
def test_an_interruption_says_how_to_go_on(
    number: int, code: int, where: str, place: Path, room: Path, clean: dict[str, str]
) -> None:
    done = program(asked(place, room / "q"), at_file(where, signalled(number)))
    assert (done.code, done.stdout) == (code, "")
    assert "Interrupted. An unfinished output is kept; the same command resumes it." in done.stderr
    assert "q" not in names(room)
    resumed(place, room, clean)


def test_on_a_full_disk_what_was_done_is_kept(place: Path, room: Path, clean: dict[str, str]) -> None:
    effects = 4
    while (done := program(asked(place, room / "q"), at_effect(effects, lambda: fail(errno.ENOSPC)))).code:
        assert (done.code, done.stdout) == (4, ""), done.stderr
        assert os.strerror(errno.ENOSPC) in done.stderr and "run the same command again to go on" in done.stderr
        assert not (room / "q").exists() or tree(room / "q") == clean
        effects += 25
    resumed(place, room, clean)
    assert effects > 100


def test_a_limit_on_files_is_no_bug(place: Path, room: Path, clean: dict[str, str]) -> None:
    before = tree(place / "moe")
    done = program(asked(place, room / "q"), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
    assert done.code == 4 and os.strerror(errno.EFBIG) in done.stderr
    assert tree(place / "moe") == before and names(room) == ["q.statistics"]
    resumed(place, room, clean)


def test_without_memory_it_is_the_machine_that_could_not(place: Path, room: Path, clean: dict[str, str]) -> None:
    done = program(asked(place, room / "q"), at_file("layer-00001.safetensors", lambda: torch.empty(1 << 50)))
    assert done.code == 4 and "out of memory" in done.stderr and "Traceback" not in done.stderr
    resumed(place, room, clean)


@pytest.mark.parametrize(
    ("what", "says"), [("free_bytes", "of disk in"), ("available_memory", "of memory, and 0 B are free")]
)
def test_too_little_room_is_said_before_the_work(
    what: str, says: str, place: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, what, lambda *_: 0)
    monkeypatch.setattr(preflight, "resident", lambda _: 0)
    monkeypatch.setattr(qmoe_job, "run", None)  # calling it would be a bug
    done = CliRunner().invoke(app, asked(place, room / "q"))
    assert isinstance(done.exception, MachineError) and says in done.exception.what
    assert names(room) == []


@pytest.mark.parametrize("act", [os.utime, lambda path: os.truncate(path, 1000)], ids=["written", "cut"])
def test_a_source_that_changes_meanwhile_is_noticed(act: Callable[[Path], None], place: Path, room: Path) -> None:
    made_moe(room / "moe")
    given = words(room / "moe", room / "q", *SMALL, data=place / "counting.jsonl")
    done = program(given, at_file("layer-00000.safetensors", lambda: act(room / "moe" / "model.safetensors")))
    assert done.code == 3 and "model.safetensors" in done.stderr and "was not published" in done.stderr
    assert not (room / "q").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "damage"), [("layer-00000.safetensors", flip), ("layer-00001.safetensors", cut), ("layer-00001.json", cut)]
)
def test_a_finished_layer_that_rotted_is_made_again(
    name: str, damage: Callable[[Path], None], place: Path, room: Path, clean: dict[str, str]
) -> None:
    program(asked(place, room / "q"), at_file("layer-00001.safetensors", signalled(signal.SIGKILL)))
    (folder,) = (room / "q.statistics").glob("layers-*")
    damage(folder / name)
    resumed(place, room, clean)


def test_without_its_hash_a_layer_that_rotted_would_be_taken(
    place: Path, room: Path, clean: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program(asked(place, room / "q"), at_file("layer-00001.safetensors", signalled(signal.SIGKILL)))
    (folder,) = (room / "q.statistics").glob("layers-*")
    flip(folder / "layer-00001.safetensors")
    monkeypatch.setattr(pipeline, "_is_whole", Path.exists)
    assert program(asked(place, room / "q")).code == 0
    assert tree(room / "q") != clean


# ---- several processes --------------------------------------------------------------------------------------


def test_a_second_process_is_refused_whatever_its_options(place: Path, room: Path, clean: dict[str, str]) -> None:
    reached, reach = os.pipe()
    go, let = os.pipe()

    def pause() -> None:
        os.write(reach, b".")
        os.read(go, 1)

    first = started(asked(place, room / "q"), at_file("layer-00001.safetensors", pause))
    os.read(reached, 1)
    for options in ((), ("--bits", "4"), ("--overwrite",)):
        second = program(asked(place, room / "q", *options))
        assert second.code == 2 and "Another process is at work in" in second.stderr
    os.write(let, b".")
    assert first.wait().code == 0
    assert tree(room / "q") == clean and names(room) == ["q"]
    for descriptor in (reached, reach, go, let):
        os.close(descriptor)


def test_processes_that_begin_at_once_do_no_harm(place: Path, room: Path, clean: dict[str, str]) -> None:
    codes = [process.wait().code for process in [started(asked(place, room / "q")) for _ in range(4)]]
    assert set(codes) <= {0, 2} and 0 in codes
    assert tree(room / "q") == clean and names(room) == ["q"]


def torchrun(arguments: list[str], changes: list[Callable[[], None]]) -> list[Ended]:
    """What torchrun does: a process for each of the changes, with its number in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(len(changes))}
    ranks = [started(arguments, change, RANK=str(rank), **world) for rank, change in enumerate(changes)]
    return [rank.wait() for rank in ranks]


def test_under_torchrun_one_process_speaks(place: Path, room: Path, clean: dict[str, str]) -> None:
    for _ in range(2):
        first, second = torchrun(asked(place, room / "q"), [lambda: None] * 2)
        assert (first.code, first.stdout) == (0, f"{room / 'q'}\n"), first.stderr
        assert second == Ended(0, "", "")
        assert tree(room / "q") == clean and names(room) == ["q"]


def test_when_one_process_of_several_dies_the_others_say_so(place: Path, room: Path, clean: dict[str, str]) -> None:
    dies = at_file("00001/*.safetensors", signalled(signal.SIGKILL))
    first, second = torchrun(asked(place, room / "q"), [lambda: None, dies])
    assert second.code == -signal.SIGKILL
    assert first.code == 4 and "Another process of this run has ended." in first.stderr
    assert "Traceback" not in first.stderr and names(room) == ["q.statistics"]
    resumed(place, room, clean)


# ---- models -------------------------------------------------------------------------------------------------


def changed(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A model's weights changed on disk; the file."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return path


def test_an_expert_that_no_token_reaches_is_rounded_to_nearest_and_said(place: Path, room: Path) -> None:
    made_moe(room / "moe")

    def unreachable(tensors: dict[str, torch.Tensor]) -> None:
        """The last expert's score is the mean of two others', each of which there is twice."""
        for layer in range(LAYERS):
            gate = tensors[f"model.layers.{layer}.mlp.gate.weight"]
            gate[1], gate[3] = gate[0], gate[2]
            gate[7] = (gate[0] + gate[2]) / 2

    changed(room / "moe", unreachable)
    done = compress(room / "moe", room / "q", *SMALL, "--json", data=place / "counting.jsonl")
    assert done.exit_code == 0, done.exception
    layers = strict(done.stdout)["layers"]
    assert [layer["experts"][7]["tokens"] for layer in layers] == [0] * LAYERS
    assert all(layer["experts"][7]["cold"] for layer in layers)
    said = " ".join(done.stderr.split())
    assert re.search(r"! \d+ of 24 experts, in 3 layers, were given too few tokens and rounded to nearest", said)
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    weight_RN = load_file(room / "moe" / "model.safetensors")[name.format(7)].float()
    quantiser = method(None, dtype=torch.bfloat16)
    nearest_GRN = quantiser.dense(quantiser.quantise(weight_RN[None], None, None))
    arguments = ["decompress", str(room / "q"), "-o", str(room / "plain")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    plain = load_file(room / "plain" / "model.safetensors")
    assert torch.equal(plain[name.format(7)].float(), nearest_GRN[0])
    ours.load(room / "q")


@pytest.mark.parametrize(
    ("tensor", "value", "dense"),
    [
        ("model.layers.1.mlp.experts.3.down_proj.weight", "nan", "int8"),
        ("model.layers.1.mlp.experts.7.up_proj.weight", "inf", "bf16"),
        ("model.layers.1.self_attn.q_proj.weight", "nan", "int8"),
        ("model.layers.1.self_attn.o_proj.weight", "-inf", "bf16"),
        ("model.layers.0.input_layernorm.weight", "nan", "int8"),
        ("model.layers.2.mlp.gate.weight", "nan", "bf16"),
        ("model.embed_tokens.weight", "nan", "int8"),
        ("model.norm.weight", "inf", "bf16"),
        ("lm_head.weight", "nan", "int8"),
    ],
)
def test_weights_that_are_not_finite_are_named(tensor: str, value: str, dense: str, place: Path, room: Path) -> None:
    made_moe(room / "moe")
    path = changed(room / "moe", lambda tensors: tensors[tensor].view(-1)[5:6].fill_(float(value)))
    done = compress(room / "moe", room / "q", *SMALL, "--dense", dense, data=place / "counting.jsonl")
    assert isinstance(done.exception, InputError), done.exception
    assert done.exception.what == f"{path}: tensor {tensor!r} holds NaN or infinity."
    assert "q" not in names(room)


@pytest.mark.parametrize(
    ("factor", "says"), [(1e5, "parameter 'model.layers.1.post_attention"), (3e4, "what layer 1 computes")]
)
def test_an_overflow_is_named_with_a_type_that_is_wide_enough(
    factor: float, says: str, place: Path, room: Path
) -> None:
    made_moe(room / "moe")
    changed(room / "moe", lambda tensors: tensors["model.layers.1.post_attention_layernorm.weight"].mul_(factor))
    given = (room / "moe", room / "q", *SMALL)
    done = compress(*given, "--dtype", "float16", data=place / "counting.jsonl")
    assert isinstance(done.exception, InputError) and says in done.exception.what
    assert "is not finite in float16" in done.exception.what and done.exception.fix == "Give --dtype float32."
    assert compress(*given, "--dtype", "float32", data=place / "counting.jsonl").exit_code == 0


def test_an_overflow_of_float32_gives_no_advice_that_was_followed(place: Path, room: Path) -> None:
    made_moe(room / "moe")
    changed(room / "moe", lambda tensors: tensors["model.layers.1.mlp.experts.3.up_proj.weight"].mul_(1e38))
    done = compress(room / "moe", room / "q", *SMALL, data=place / "counting.jsonl")
    assert isinstance(done.exception, InputError) and "float32" not in done.exception.fix


def without_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def ids_beyond_it(model: Path) -> None:
    made_moe(model, vocab_size=128)


def dense_model(model: Path) -> None:
    with quiet():
        tiny_model("llama", vocab_size=258).save_pretrained(model)


def dense_encoder_decoder(model: Path) -> None:
    with quiet():
        tiny_model("t5", vocab_size=258).save_pretrained(model)


def fp8(model: Path) -> None:
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    changed(model, quantise)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))


def without_an_expert(model: Path) -> None:
    changed(model, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_tokenizer, "has no tokenizer"),
        (ids_beyond_it, "its vocabulary has 128"),
        (dense_model, "has no routed experts"),
        (dense_encoder_decoder, "has no routed experts"),
        (fp8, "quantised"),
        (without_an_expert, "experts.3.up_proj"),
    ],
)
def test_models_that_cannot_be_used_are_refused(
    change: Callable[[Path], None], says: str, place: Path, room: Path
) -> None:
    made_moe(room / "moe")
    change(room / "moe")
    before = tree(room)
    done = compress(room / "moe", room / "q", *SMALL, data=place / "counting.jsonl")
    assert isinstance(done.exception, InputError) and says in done.exception.what, done.exception
    assert tree(room) == before


def test_what_is_coded_already_is_not_coded_again(place: Path, room: Path) -> None:
    done = compress(place / "clean" / "q", room / "q", *SMALL, data=place / "counting.jsonl")
    assert isinstance(done.exception, InputError) and "moectl decompress" in done.exception.fix
    assert names(room) == []


@pytest.mark.parametrize("documents", [[], ["", ""], ["a few words"]])
def test_too_little_text_is_refused(documents: list[str], place: Path, room: Path) -> None:
    done = compress(place / "moe", room / "q", *SMALL, data=texts(room / "few.jsonl", documents))
    assert isinstance(done.exception, InputError) and done.exception.fix
    assert names(room) == ["few.jsonl"]


HOSTILE = "no\x1b[31m[bold]\nwhere"


def test_hostile_names_are_shown_escaped(place: Path, room: Path) -> None:
    made_moe(room / HOSTILE)
    given = (room / HOSTILE, room / f"q{HOSTILE}", *SMALL)
    done = compress(*given, "--html", room / "page.html", data=place / "counting.jsonl")
    assert done.exit_code == 0, done.exception
    assert done.stdout == f"{room / f'q{HOSTILE}'}\n"
    for text in (done.stderr, (room / "page.html").read_text(), (room / f"q{HOSTILE}" / "README.md").read_text()):
        assert "\x1b" not in text and "no\\x1b[31m" in text
    changed(room / HOSTILE, lambda tensors: tensors.update({f"evil{HOSTILE}": torch.ones(2)}))
    refused = program(words(*given, "--overwrite", data=place / "counting.jsonl"))
    assert refused.code == 3 and "\x1b" not in refused.stderr and "evilno\\" in refused.stderr
