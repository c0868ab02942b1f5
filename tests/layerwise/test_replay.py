"""Layers replayed one at a time return, bit for bit, what they return in the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_models import FAMILIES, TWO_STACKS, saved, token_ids
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from moectl.errors import InputError
from moectl.layerwise.replay import Replay, Returned, Tokens
from moectl.layerwise.stored import read_tree, write_tree

SHARED_KV = {
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
}


def ran(model: Any, tokens: Tokens) -> None:
    with torch.no_grad():
        if isinstance(tokens, tuple):
            model(input_ids=tokens[0], decoder_input_ids=tokens[1], use_cache=False)
        else:
            model.get_decoder()(input_ids=tokens, use_cache=False)


def returned(model: Any, names: list[str], tokens: Tokens) -> list[Any]:
    """What each layer returns in a pass through the whole model, hidden states before anybody writes into them."""
    found: list[Any] = []
    for layer in map(model.get_submodule, names):
        layer.register_forward_hook(lambda _m, _a, output: found.append(tree_map_only(Tensor, torch.clone, output)))
    ran(model, tokens)
    return found


def replayed(replay: Replay, tokens: Tokens, path: Path) -> list[Any]:
    """The same, each layer from a file with what the layer before it returned."""
    found, before, encoded = [], None, None
    for index in range(len(replay.layers)):
        if index and index == replay.encoders:
            before, encoded = None, before
        with replay.turn(index):
            after: Returned = replay.run_watched(tokens, before, encoded)
        found.append(after[0])
        write_tree(path, after)
        before = read_tree(path)
    return found


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        leaves, wanted = tree_leaves(one), tree_leaves(other)
        assert len(leaves) == len(wanted)
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, wanted, strict=True))


@pytest.mark.parametrize("family", [*FAMILIES, *TWO_STACKS, "gemma4_text, shared keys"])
def test_every_layer_of_every_family_is_that_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model_type, _, shared = family.partition(", ")
    source, model = saved(tmp_path / "model", model_type, **(SHARED_KV if shared else {}))
    token_BL = torch.from_numpy(token_ids(2, 16))
    tokens = (token_BL, torch.from_numpy(token_ids(2, 12, 1))) if model_type in TWO_STACKS else token_BL
    replay = Replay.open(source)
    assert_same(replayed(replay, tokens, tmp_path / "before"), returned(model, replay.names, tokens))


def test_a_difference_would_show(tmp_path: Path) -> None:
    """Of one rounding in one hidden state of one layer."""
    source, model = saved(tmp_path / "model", "mixtral")
    token_BL = torch.from_numpy(token_ids(2, 16))
    replay = Replay.open(source)
    expected = returned(model, replay.names, token_BL)
    expected[1][0, 0, 0] = torch.nextafter(expected[1][0, 0, 0], torch.tensor(torch.inf))
    with pytest.raises(AssertionError):
        assert_same(replayed(replay, token_BL, tmp_path / "before"), expected)


def test_weights_that_are_changed_as_they_are_read_are_those_that_run(tmp_path: Path) -> None:
    source, model = saved(tmp_path / "model", "mixtral")
    token_BL = torch.from_numpy(token_ids(2, 16))
    replay = Replay.open(source)
    seen = []

    def prepare(name: str, module: torch.nn.Module) -> None:
        seen.append(name)
        if name == "model.embed_tokens":
            module.weight.mul_(2)

    replay.prepare = prepare
    model.model.embed_tokens.weight.data.mul_(2)
    assert_same(replayed(replay, token_BL, tmp_path / "before"), returned(model, replay.names, token_BL))
    assert seen == [name for index in range(3) for name in (f"model.layers.{index}", "model.embed_tokens")]


def test_a_layer_that_keeps_something_for_later_ones_is_refused(tmp_path: Path) -> None:
    source, _ = saved(tmp_path / "model", "mixtral")
    token_BL = torch.from_numpy(token_ids(2, 16))
    replay = Replay.open(source)
    attention = replay.layers[0].self_attn
    forward = attention.forward

    def keeping(*given: Any, **named: Any) -> Any:
        output = forward(*given, **named)
        attention.kept = output[0] * 2
        return output

    attention.forward = keeping
    with replay.turn(0):
        replay.run(token_BL, None)
        with pytest.raises(InputError, match=r"layer 0 keeps 1 tensors that it does not return \(\[2, 16, 64\]"):
            replay.run_watched(token_BL, None)


def test_only_the_layer_in_turn_and_what_it_needs_has_weights(tmp_path: Path) -> None:
    source, _ = saved(tmp_path / "model", "mixtral")
    replay = Replay.open(source)

    def there() -> set[str]:
        parameters = replay.model.named_parameters()
        return {name for name, value in parameters if value.untyped_storage().nbytes() >= value.nbytes}

    assert not there()
    with replay.turn(0):
        before = replay.run(torch.from_numpy(token_ids(2, 16)), None)
    assert not there()
    with replay.turn(1):
        replay.run(torch.from_numpy(token_ids(2, 16)), before)
        assert {name.split(".")[2] for name in there() if "layers" in name} == {"1"}
        assert {name for name in there() if "layers" not in name} == {"model.embed_tokens.weight"}
    assert not there()


@pytest.mark.parametrize(
    "tree",
    [
        torch.arange(6).view(2, 3).T,
        (torch.ones(2, dtype=torch.bfloat16), None),
        (torch.zeros(0, 3), {"shared": {"full": (torch.ones(1), torch.ones(1)), 3: [1, 2.5, "x", True]}}),
    ],
)
def test_trees_come_back_as_they_were(tree: Any, tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", tree)
    back = read_tree(tmp_path / "tree")
    assert_same([back], [tree])
    assert str(torch.utils._pytree.tree_structure(back)) == str(torch.utils._pytree.tree_structure(tree))
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_what_cannot_be_stored_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="set cannot be stored"):
        write_tree(tmp_path / "tree", ({1, 2},))
    assert not list(tmp_path.iterdir())
