"""A model whose loss is the distance of its next-token distribution from a teacher's, for transformers' `Trainer`.

This is the one place where gradients cross the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmprune.training.divergence import Top, divergence, divergence_from_top
from llmprune.training.logits import TwoParts, two_parts

NO_TOKEN = -100
"""Stands for the next token where a window ends."""


@dataclass(frozen=True, slots=True)
class Loss:
    """How a student's distribution is compared with its teacher's and with the text.

    Args:
        temperature: T of the divergence.
        mix: weight of the text's cross-entropy; the divergence has what is left to 1.
    """

    temperature: float = 1.0
    mix: float = 0.0


class Targets(Protocol):
    """The teacher's distributions at the positions of some windows."""

    def divergence(self, logits: Tensor, where: slice, temperature: float) -> Tensor:
        """The divergence of a student's logits `(positions, vocabulary)` from the teacher, summed over positions."""
        ...


class Teacher(Protocol):
    """Gives the targets of windows."""

    def __call__(self, rows: Tensor, tokens: Tensor) -> Targets:
        """The targets of windows, by their numbers `(windows,)` and tokens `(windows, length)`."""
        ...


class Recomputed:
    """A teacher that runs on every window it is asked for.

    Args:
        model: of transformers; its weights are in memory.
        device: of its inputs.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.parts = two_parts(model, device)

    @torch.no_grad()
    def __call__(self, rows: Tensor, tokens: Tensor) -> Targets:
        """The targets of windows."""
        return _Hidden(self.parts, self.parts.trunk(tokens).flatten(0, 1))

    @torch.no_grad()
    def top(self, tokens: Tensor, count: int, temperature: float) -> Top:
        """The largest probabilities at every position of windows, `(windows · length, count)`."""
        hidden = self.parts.trunk(tokens).flatten(0, 1)
        found = [
            Top.of(self.parts.head(hidden[where]).float(), count, temperature)
            for where in self.parts.chunks(len(hidden))
        ]
        return Top(*(torch.cat(parts) for parts in zip(*((one.tokens, one.logarithms) for one in found), strict=True)))


@dataclass(frozen=True, slots=True)
class _Hidden:
    parts: TwoParts
    hidden: Tensor

    def divergence(self, logits: Tensor, where: slice, temperature: float) -> Tensor:
        with torch.no_grad():
            teacher = self.parts.head(self.hidden[where]).float()
        return divergence(logits, teacher, temperature)


class Cached:
    """A teacher whose largest probabilities were kept.

    Args:
        read: gives them for one window, `(length, k)`.
    """

    def __init__(self, read: Callable[[int], Top]) -> None:
        self.read = read

    def __call__(self, rows: Tensor, tokens: Tensor) -> Targets:
        """The targets of windows."""
        found = [self.read(int(row)) for row in rows]
        return _Kept(
            Top(
                torch.cat([one.tokens for one in found]).to(tokens.device),
                torch.cat([one.logarithms for one in found]).float().to(tokens.device),
            )
        )


@dataclass(frozen=True, slots=True)
class _Kept:
    top: Top

    def divergence(self, logits: Tensor, where: slice, temperature: float) -> Tensor:
        return divergence_from_top(logits, Top(self.top.tokens[where], self.top.logarithms[where]), temperature)


class Distilled(nn.Module):
    """A student that returns its loss; in evaluation mode the divergence itself, at temperature 1.

    Args:
        student: of transformers; its weights are in memory.
        teachers: of training and of evaluation.
        loss: of training.
        device: of the inputs.
    """

    def __init__(self, student: nn.Module, teachers: tuple[Teacher, Teacher], loss: Loss, device: torch.device) -> None:
        super().__init__()
        self.student = student
        self.config = student.config
        self._teachers, self._loss = teachers, loss
        self._parts = two_parts(student, device)
        self._register_state_dict_hook(_tied_once)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_tied_are_there)  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """The mean loss per token.

        Args:
            input_ids: `(windows, length)`, int64.
            rows: numbers of the windows, `(windows,)`.
        """
        teacher = self._teachers[0 if self.training else 1]
        loss = self._loss if self.training else Loss()
        following = functional.pad(input_ids[:, 1:], (0, 1), value=NO_TOKEN).flatten()
        hidden = self._parts.trunk(input_ids).flatten(0, 1)
        compute = _of_positions(self._parts, teacher(rows, input_ids), following, loss)
        if not torch.is_grad_enabled():
            parts = [compute(hidden[where], where) for where in self._parts.chunks(len(hidden))]
            return {"loss": torch.stack(parts).sum()}
        return {"loss": _Chunked.apply(compute, self._parts, hidden, *self._parts.parameters)}  # type: ignore[no-untyped-call]


def _of_positions(
    parts: TwoParts, targets: Targets, following: Tensor, loss: Loss
) -> Callable[[Tensor, slice], Tensor]:
    """The loss of some positions, as a part of the mean over all of them."""
    known = int((following != NO_TOKEN).sum())

    def compute(hidden: Tensor, where: slice) -> Tensor:
        logits = parts.head(hidden).float()
        total = (1 - loss.mix) / len(following) * targets.divergence(logits, where, loss.temperature)
        if loss.mix:
            entropy = functional.cross_entropy(logits, following[where], ignore_index=NO_TOKEN, reduction="sum")
            total = total + loss.mix / max(known, 1) * entropy
        return total

    return compute


class _Chunked(torch.autograd.Function):
    """A sum over chunks of positions whose gradients are found in the forward pass, one chunk of logits in memory."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[Tensor, slice], Tensor], parts: TwoParts, hidden: Tensor, *parameters: Tensor
    ) -> Tensor:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden)
        sums = [torch.zeros_like(parameter) for parameter in trained]
        for where in parts.chunks(len(hidden)):
            with torch.enable_grad():
                part = hidden[where].detach().requires_grad_()
                value = compute(part, where)
                found = torch.autograd.grad(value, [part, *trained])
            gradient[where] = found[0]
            for so_far, new in zip(sums, found[1:], strict=True):
                so_far.add_(new)
            total += value.detach()
        ctx.needed = [parameter.requires_grad for parameter in parameters]
        ctx.save_for_backward(gradient, *sums)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        gradient, *sums = ctx.saved_tensors
        left = iter(sums)
        return None, None, gradient * outer[0], *(next(left) * outer[0] if needed else None for needed in ctx.needed)


def _tied_once(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Keep tied parameters once in a state, as safetensors want it."""
    seen: set[tuple[int, Any]] = set()
    for name, tensor in list(state.items()):
        key = (tensor.data_ptr(), tensor.shape)
        if key in seen:
            del state[name]
        seen.add(key)


def _tied_are_there(module: nn.Module, keys: Any) -> None:
    """Say of no name that it is missing in a state whose tensor is there under another one."""
    kept = module.state_dict()
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in kept]


def windows_of(tokens: Tensor) -> Sequence[dict[str, Tensor]]:
    """Windows `(windows, length)` as the rows of a data set."""
    return [{"input_ids": row, "rows": torch.tensor(number)} for number, row in enumerate(tokens)]
