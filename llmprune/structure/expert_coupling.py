"""The coupled channels of experts: the inputs of an expert's last matrix with the rows of its first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llmprune.model.experts import ExpertMatrix, says_how
from llmprune.structure.coupling import Coupling, Dependency, Producer


def expert_couplings(block: nn.Module) -> list[Coupling]:
    """A coupling for every expert of a module that says how it holds gate and up.

    The rows of the first matrix that make input j of the last one are j and I + j where gate and up lie one behind the
    other, 2j and 2j + 1 where they alternate, and j without a gate. It counts only if the module's own activation is
    seen to treat every channel alone.

    Args:
        block: one transformer block, also on the meta device.
    """
    return [
        coupling
        for local, module in block.named_modules()
        if says_how(module)
        for coupling in _of_module(local, module)
    ]


def has_experts(block: nn.Module) -> bool:
    """Whether a block has experts among its layers."""
    return any(isinstance(module, ExpertMatrix) for module in block.modules())


def _of_module(local: str, module: nn.Module) -> Iterator[Coupling]:
    matrices = [
        (f"{local}.{index}.{name}", part.place.layout)
        for index, expert in module._modules.items()
        if index.isdigit() and expert is not None
        for name, part in expert._modules.items()
        if isinstance(part, ExpertMatrix)
    ]
    pairs = list(zip(matrices[::2], matrices[1::2], strict=False))
    if not pairs or any(first.rpartition(".")[0] != last.rpartition(".")[0] for (first, _), (last, _) in pairs):
        return
    # A parameter has one layout, so all experts of a module are alike, and share what is said of their channels.
    (_, entry), (_, exit_) = pairs[0]
    gates, width = 2 if module.has_gate else 1, exit_.shape[1]
    if entry.shape[0] != gates * width:
        return
    rows = torch.arange(gates * width)
    rows = rows.view(gates, width) if module.is_concatenated else rows.view(width, gates).T
    if not _keeps_channels_apart(module, rows):
        return
    slots, single = torch.arange(width)[None], torch.empty_like(rows.flatten())
    single[rows] = slots.expand_as(rows)
    none, nowhere = torch.empty(0, dtype=torch.long), torch.empty(0, width, dtype=torch.bool)
    for (first, _), (last, _) in pairs:
        producer = Producer(first, entry.transposed, (rows,))
        dependency = Dependency(first, single, none, nowhere, entry.transposed)
        yield Coupling(last, exit_.transposed, width, (slots,), (producer,), (dependency,), removable=True)


def _keeps_channels_apart(module: nn.Module, rows: Tensor) -> bool:
    """Whether the activation of permuted rows is the permuted activation, and of a channel that of its rows alone."""
    activation = module._apply_gate if module.has_gate else getattr(module, "act_fn", None)
    generator = torch.Generator().manual_seed(0)
    inputs, noise = torch.randn(2, 8, rows.numel(), generator=generator, dtype=torch.float64)
    move = torch.randperm(rows.shape[1], generator=generator)
    moved, mixed = torch.empty_like(inputs), inputs.clone()
    moved[:, rows] = inputs[:, rows[:, move]]
    mixed[:, rows[:, ::2]] = noise[:, rows[:, ::2]]
    try:
        plain, other, apart = (activation(values) for values in (inputs, moved, mixed))  # type: ignore[misc, operator]
    except (RuntimeError, TypeError, AttributeError):
        return False
    return (
        plain.shape == (8, rows.shape[1])
        and torch.allclose(other, plain[:, move], rtol=1e-10, atol=1e-12)
        and torch.allclose(apart[:, 1::2], plain[:, 1::2], rtol=1e-10, atol=1e-12)
    )
