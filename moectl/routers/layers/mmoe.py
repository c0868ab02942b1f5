"""Experts shared by tasks: MMoE (Ma et al., KDD 2018) and PLE (Tang et al., RecSys 2020), with soft gates.

Checked against facebookresearch/AdaTT, `mtl_lib.py` (`MLMMoE` of one level, `PLE`).
Legend: B sequences, L length, D hidden, O expert width, E experts, Z tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moectl.routers.labels import labelled
from moectl.routers.layers.parts import parameter
from moectl.routers.protocol import Context


class Mmoe(nn.Module):
    """y_z = sum_e softmax(G_z x)_e relu(W_e x + b_e): all experts for all tasks, a gate for each.

    Implementations: facebookresearch/AdaTT (`MLMMoE` of one level) is followed, but for its gates' biases and hidden
    layers (the paper's section 4.2, number from memory).

    Args:
        hidden_size: D.
        output_size: O.
        num_experts: E.
        tasks: Z.
    """

    def __init__(self, hidden_size: int, output_size: int, num_experts: int, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks
        self.weight_EOD = parameter(num_experts, output_size, hidden_size)
        self.bias_EO = nn.Parameter(torch.zeros(num_experts, output_size))
        self.gate_ZED = parameter(tasks, num_experts, hidden_size)

    def all_tasks(self, x_BLD: Tensor) -> Tensor:
        """The output for each task [B, L, Z, O]."""
        expert_BLEO = torch.relu(torch.einsum("bld,eod->bleo", x_BLD, self.weight_EOD) + self.bias_EO)
        gate_BLZE = torch.einsum("bld,zed->blze", x_BLD, self.gate_ZED).softmax(-1)
        return gate_BLZE @ expert_BLEO

    def forward(self, x_BLD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(y [B, L, O] for the task of each token, 0), with `context.task_T` of all B * L tokens.

        Raises:
            ValueError: tasks are missing, or out of range.
        """
        return _of_task(self.all_tasks(x_BLD), context), x_BLD.new_zeros(())


class Ple(nn.Module):
    """Levels of experts, some of each task and some shared; a task's gate sees its own and the shared ones only.

    At each level but the last there is also a shared stream, whose gate sees all experts and which feeds the shared
    experts of the next level. With one level it is CGC.

    Implementations: facebookresearch/AdaTT (`PLE`) is followed, but for its gates' biases (the paper's section 4.2,
    number from memory). LibMTL's, of ResNet stages, has no shared stream: shared experts are run on each task's own
    representation, once for each task, and a task's gate sees the same experts as here.

    Args:
        hidden_size: D.
        output_sizes: O of each level.
        tasks: Z.
        own: experts of each task at each level.
        shared: shared experts at each level.
    """

    def __init__(self, hidden_size: int, output_sizes: list[int], tasks: int, own: int = 1, shared: int = 1) -> None:
        super().__init__()
        self.tasks, self.own, self.shared = tasks, own, shared
        num_experts = tasks * own + shared
        sizes = [hidden_size, *output_sizes]
        self.weights = nn.ParameterList(
            parameter(num_experts, after, before) for before, after in zip(sizes, output_sizes, strict=False)
        )
        self.biases = nn.ParameterList(torch.zeros(num_experts, after) for after in output_sizes)
        self.task_gates = nn.ParameterList(parameter(tasks, own + shared, before) for before in sizes[:-1])
        self.shared_gates = nn.ParameterList(parameter(num_experts, before) for before in sizes[:-2])

    def all_tasks(self, x_BLD: Tensor) -> Tensor:
        """The output for each task [B, L, Z, O]."""
        stream_BLZD = x_BLD[:, :, None].expand(-1, -1, self.tasks + 1, -1)  # the last stream is the shared one
        ours = self.tasks * self.own
        owner_E = torch.arange(ours + self.shared, device=x_BLD.device).div(self.own, rounding_mode="floor")
        owner_E = owner_E.clamp(max=self.tasks)
        for level, (weight_EOD, bias_EO) in enumerate(zip(self.weights, self.biases, strict=True)):
            input_BLED = stream_BLZD[:, :, owner_E]
            expert_BLEO = torch.relu(torch.einsum("bled,eod->bleo", input_BLED, weight_EOD) + bias_EO)
            own_BLZNO = expert_BLEO[:, :, :ours].unflatten(2, (self.tasks, self.own))
            shared_BLZNO = expert_BLEO[:, :, None, ours:].expand(-1, -1, self.tasks, -1, -1)
            seen_BLZNO = torch.cat([own_BLZNO, shared_BLZNO], 3)
            gate_BLZN = torch.einsum("blzd,znd->blzn", stream_BLZD[:, :, :-1], self.task_gates[level]).softmax(-1)
            streams = [torch.einsum("blzn,blzno->blzo", gate_BLZN, seen_BLZNO)]
            if level < len(self.shared_gates):
                gate_BLE = torch.einsum("bld,ed->ble", stream_BLZD[:, :, -1], self.shared_gates[level]).softmax(-1)
                streams.append(torch.einsum("ble,bleo->blo", gate_BLE, expert_BLEO)[:, :, None])
            stream_BLZD = torch.cat(streams, 2)
        return stream_BLZD

    def forward(self, x_BLD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """As of `Mmoe`."""
        return _of_task(self.all_tasks(x_BLD), context), x_BLD.new_zeros(())


def _of_task(y_BLZO: Tensor, context: Context) -> Tensor:
    """The output for the task of each token [B, L, O]."""
    B, L, Z, _ = y_BLZO.shape
    task_T = labelled(context.task_T, Z, "task")
    y_TO = y_BLZO.flatten(0, 1)[torch.arange(B * L, device=task_T.device), task_T]
    return y_TO.view(B, L, -1)
