"""Every family: each expert's matrices are seen, and their Hessians are X^T X of what they are multiplied with.

The reference shares nothing with what watches products: what a module of experts was given in the whole model says the
rows of the first matrices; those of the second are read off the module's output with the second matrix a selection of
its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import needs
from pipeline_models import FAMILIES, TWO_STACKS, Exact, saved, token_ids
from safetensors.torch import load_file
from torch import Tensor, nn

from moectl.compress.pipeline.moments import Moments
from moectl.compress.pipeline.report import reports
from moectl.compress.pipeline.run import run
from moectl.compress.pipeline.settings import Settings
from moectl.errors import InputError
from moectl.layerwise.experts import choice, takes_choice

NO_MATRICES = {"doge"}
"""Its experts are rows of an embedding."""
SETTINGS = Settings(batch_experts=3, min_tokens=1, cap=1e9, micro_batch=2)


def selection(experts: nn.Module, name: str, inputs: int, expert: int, x_SD: Tensor) -> Tensor:
    """The rows [S, N] that an expert's second matrix is multiplied with, some columns of them at a time."""
    parameter = experts.get_parameter(name)
    whole = parameter.data.clone()
    rows = whole.view(-1, *((inputs, whole.shape[-1]) if whole.ndim == 2 else whole.shape[1:]))
    flip = rows.shape[1] == inputs and (getattr(experts, "is_transposed", False) or whole.ndim == 2)
    outputs = rows.shape[2 if flip else 1]
    times = 2 if type(experts).__name__ == "LongcatFlashExperts" else 1
    index = torch.full((len(x_SD), times), expert)
    parts = []
    try:
        parameter.data.zero_()
        idle = experts(x_SD, index, torch.ones(index.shape))
        for start in range(0, inputs, outputs):
            chosen = torch.zeros(outputs, inputs)
            size = min(outputs, inputs - start)
            chosen[torch.arange(size), start + torch.arange(size)] = 1
            parameter.data.zero_().view_as(rows)[expert] = chosen.T if flip else chosen
            parts.append((experts(x_SD, index, torch.ones(index.shape)) - idle).view(len(x_SD), -1)[:, :size] / times)
    finally:
        parameter.data.copy_(whole)
    return torch.cat(parts, 1)


class Reference:
    """What the matrices of a model in memory are multiplied with, over all passes."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[tuple[str, int], list[Tensor]] = {}
        for name, module in model.named_modules():
            kind = type(module).__name__
            if kind == "JetMoeParallelExperts":
                module.register_forward_pre_hook(lambda m, given, name=name: self.split(name, *given))
            elif kind == "Llama4TextExperts":
                module.register_forward_pre_hook(lambda m, given, name=name: self.weighted(name, m, *given))
            elif kind.endswith("DenseActDense") and "expert_" in name:
                for leaf, linear in module.named_children():
                    if isinstance(linear, nn.Linear):
                        linear.register_forward_pre_hook(
                            lambda m, given, name=f"{name}.{leaf}.weight": self.add(name, 0, given[0])
                        )
            elif takes_choice(module) and not isinstance(module, nn.ModuleDict):
                module.register_forward_pre_hook(
                    lambda m, given, named, name=name: self.chosen(name, m, *choice(m, given, named)), with_kwargs=True
                )

    def add(self, name: str, expert: int, x_SN: Tensor) -> None:
        self.rows.setdefault((name, expert), []).append(x_SN.double())

    @property
    def parameters(self) -> set[str]:
        return {name for name, _ in self.rows}

    def split(self, name: str, x_SN: Tensor, sizes: list[int]) -> None:
        for expert, rows in enumerate(x_SN.split(sizes)):
            self.add(f"{name}.weight", expert, rows)

    def weighted(self, name: str, module: Any, x_SD: Tensor) -> None:
        for expert, rows in enumerate(x_SD.view(module.num_experts, -1, module.hidden_size)):
            rows = rows[rows.any(1)]
            gate, up = (rows @ module.gate_up_proj[expert]).chunk(2, -1)
            self.add(f"{name}.gate_up_proj", expert, rows)
            self.add(f"{name}.down_proj", expert, module.act_fn(gate) * up)

    def chosen(self, name: str, module: nn.Module, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> None:
        for leaf, inputs, second in stacks(module):
            for expert in range(min(module.get_parameter(each).numel() // size for each, size in sizes(module))):
                x_SD = x_TD[((index_TK == expert) & (weight_TK != 0)).any(1)]
                if len(x_SD):
                    hooks, module._forward_pre_hooks = module._forward_pre_hooks, type(module._forward_pre_hooks)()
                    rows = selection(module, leaf, inputs, expert, x_SD) if second else x_SD
                    module._forward_pre_hooks = hooks
                    self.add(f"{name}.{leaf}", expert, rows)


def stacks(module: Any) -> Iterator[tuple[str, int, bool]]:
    """The matrices of a module: name, inputs, and whether they come second."""
    if type(module).__name__ == "DbrxExperts":
        yield from (("mlp.w1", 64, False), ("mlp.v1", 64, False), ("mlp.w2", 32, True))
        return
    down = dict(module.named_parameters())["down_proj"]
    up = next(name for name in ("gate_up_proj", "up_proj") if hasattr(module, name))
    transposed = getattr(module, "is_transposed", False)
    yield up, module.get_parameter(up).shape[1 if transposed else 2], False
    yield "down_proj", down.shape[1 if transposed else 2], True


def sizes(module: Any) -> list[tuple[str, int]]:
    """Numbers in one expert's matrix, by parameter."""
    if type(module).__name__ == "DbrxExperts":
        return [("mlp.w1", 32 * 64)]
    return [(name, module.get_parameter(name)[0].numel()) for name, _, _ in stacks(module)]


@pytest.mark.parametrize("family", [*sorted(set(FAMILIES) - NO_MATRICES), *TWO_STACKS])
def test_hessians_are_those_of_what_each_matrix_is_multiplied_with(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layer, on all tokens; and what is stored of a model that is left as it is, is that model."""
    source, model = saved(tmp_path / "model", family)
    ids, targets = token_ids(4, 24), token_ids(4, 20, 1)
    two = family in TWO_STACKS
    found: dict[tuple[str, int], Tensor] = {}
    none = Moments.none

    def kept(*given: Any) -> Moments:
        moments = none(*given)
        for stack, hessian_GNN in zip(moments.stacks, moments.hessians, strict=True):
            for at in range(len(hessian_GNN)):
                expert = moments.start + at
                found[(stack.names[0], expert) if stack.stacked else (stack.names[expert], 0)] = hessian_GNN[at]
        return moments

    monkeypatch.setattr(Moments, "none", kept)
    files = run(source, (ids, targets) if two else ids, Exact(), SETTINGS, tmp_path / "work")
    reference = Reference(model)
    with torch.no_grad():
        for rows, others in zip(torch.from_numpy(ids).split(2), torch.from_numpy(targets).split(2), strict=True):
            model(input_ids=rows, use_cache=False, **({"decoder_input_ids": others} if two else {}))
    assert reference.rows
    for key, rows in reference.rows.items():
        x_SN = torch.cat(rows)
        hessian_NN = found.pop(key)
        assert (hessian_NN - x_SN.T @ x_SN).norm() <= 1e-5 * (x_SN.T @ x_SN).norm(), key
    assert all(not hessian_NN.any() for hessian_NN in found.values())
    stored = {name: value for file in files for name, value in load_file(file).items()}
    parameters = dict(model.named_parameters())
    names = {name.removesuffix(".plain") for name in stored}
    assert reference.parameters <= names
    if not two:  # there experts that were given nothing have names of their own
        assert reference.parameters == names
    for name, value in stored.items():
        whole = parameters[name.removesuffix(".plain")].data
        assert torch.equal(value.reshape(whole.shape), whole), name
    counted = {(each.parameter, each.expert): each.tokens for report in reports(files) for each in report.matrices}
    for key, tokens in counted.items():
        key = key if key in reference.rows or not two else (key[0], 0)
        assert tokens == sum(len(part) for part in reference.rows.get(key, [])), key


@needs("doge")
def test_a_model_without_matrices_of_experts_is_refused(tmp_path: Path) -> None:
    source, _ = saved(tmp_path / "model", "doge")
    with pytest.raises(InputError, match="has no experts whose matrices can be quantised"):
        run(source, token_ids(), Exact(), SETTINGS, tmp_path / "work")
