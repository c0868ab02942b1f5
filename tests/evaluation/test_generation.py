"""`moectl generate`: what transformers itself generates, as it comes; dense, coded, encoder-decoder; and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from coded_models import write_coded
from installed import needs
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moectl.checkpoint.source import Checkpoint
from moectl.cli.main import app
from moectl.data.tokens import BYTE_EOS_ID, byte_tokenizer
from moectl.errors import InputError, UsageError
from moectl.evaluation.generation import Generated, Settings, _Streamer, generate
from moectl.families.tiny import tiny_model
from moectl.families.tiny_moe import tiny_moe

SIZES: dict[str, Any] = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": BYTE_EOS_ID}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose tokens are bytes: a dense one, a MoE, the same with coded experts, and an encoder-decoder."""
    root = tmp_path_factory.mktemp("generate")
    tiny_model("llama", **SIZES).save_pretrained(root / "dense")
    write_coded(tiny_moe("mixtral", **SIZES), root / "moe")
    write_coded(tiny_moe("switch_transformers", **SIZES, decoder_start_token_id=0), root / "switch")
    for model in ("dense", "moe/plain", "moe/coded", "switch/plain", "switch/coded"):
        byte_tokenizer().save_pretrained(root / model)
    return root


def run(model: Path, *arguments: Any, **options: Any) -> Result:
    return CliRunner().invoke(app, ["generate", str(model), *map(str, arguments)], **options)


def written(model: Path, prompt: str, **settings: Any) -> tuple[Generated, list[str]]:
    pieces: list[str] = []
    return generate(
        Checkpoint.open(model), prompt, Settings(**{"max_new_tokens": 24} | settings), pieces.append
    ), pieces


@pytest.mark.parametrize("name", ["dense", "moe/plain", "moe/coded"])
def test_it_is_what_transformers_generates(place: Path, name: str) -> None:
    """The likeliest tokens; coded experts give the text of plain ones."""
    found, pieces = written(place / name, "def f(x):")
    model = AutoModelForCausalLM.from_pretrained(place / name.replace("coded", "plain"))
    ids = torch.tensor([list(b"def f(x):")])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    assert found.text == "".join(pieces) == byte_tokenizer().decode(expected[0, 9:], skip_special_tokens=True)
    assert found.prompt_tokens == 9 and found.new_tokens == expected.shape[1] - 9
    assert found.seconds > 0 and (found.peak_bytes or 1) > 0


def test_text_comes_piece_by_piece() -> None:
    """Each word is passed on as soon as it is complete, and of the prompt nothing."""
    pieces: list[str] = []
    streamer = _Streamer(byte_tokenizer(), pieces.append)
    streamer.put(torch.tensor([list(b"the prompt ")]))
    heard = []
    for token in b"one two\nthree":
        streamer.put(torch.tensor([token]))
        heard.append("".join(pieces))
    streamer.end()
    assert heard[3:5] == ["one ", "one "] and heard[7] == "one two\n"
    assert "".join(pieces) == "one two\nthree" and len(streamer.times) == 13


def test_it_stops_where_the_text_ends(place: Path, tmp_path: Path) -> None:
    """The token that ends a text counts as one that was written, and is not shown."""
    model = tiny_model("llama", **SIZES)
    with torch.no_grad():
        last = model.model(torch.tensor([list(b"abc")])).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()[BYTE_EOS_ID] = last
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    found, pieces = written(tmp_path, "abc")
    assert (found.text, found.new_tokens, found.tokens_per_second, pieces) == ("", 1, None, [])


def test_sampling_follows_the_seed(place: Path) -> None:
    texts = [written(place / "moe" / "coded", "def", temperature=1.0, seed=seed)[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@needs("switch_transformers")
def test_an_encoder_decoder_answers(place: Path) -> None:
    coded, plain = (written(place / "switch" / kind, "translate me")[0] for kind in ("coded", "plain"))
    assert coded.text == plain.text and coded.new_tokens == 24


def test_the_command(place: Path) -> None:
    """Text alone on stdout; the same from stdin; one document with --json."""
    expected = written(place / "moe" / "coded", "def f")[0].text
    asked = (place / "moe" / "coded", "--max-new-tokens", 24)
    shown = run(*asked, "--prompt", "def f")
    assert shown.exit_code == 0 and shown.stdout == expected + "\n" and "24 tokens after 5" in shown.stderr
    assert run(*asked, "--prompt", "-", input="def f").stdout == shown.stdout
    told = json.loads(run(*asked, "--prompt", "def f", "--json", "--quiet").stdout)
    assert told["schema"] == "moectl.generate/1" and told["text"] == expected and told["new_tokens"] == 24


def test_mistakes(place: Path, tmp_path: Path) -> None:
    """A text that is too long, an implementation nobody knows, no tokenizer."""
    tiny_model("llama", **SIZES).save_pretrained(tmp_path)
    for arguments, kind, words in (
        ((place / "dense", "--prompt", "x", "--max-new-tokens", 10**6), UsageError, "positions"),
        ((place / "moe/plain", "--prompt", "x", "--experts-implementation", "magic"), UsageError, "cannot run"),
        ((tmp_path, "--prompt", "x"), InputError, "has no tokenizer"),
    ):
        error = run(*arguments).exception
        assert isinstance(error, kind) and words in str(error)
