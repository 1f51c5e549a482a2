"""Block-wise reconstruction: a pruned block is trained towards the dense block's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmprune.reporting.report import BlockReconstruction
from llmprune.runtime.process_group import ProcessGroup
from llmprune.streaming.batch import Batch, hidden_of
from llmprune.streaming.batch_shards import validation_batches
from llmprune.streaming.block import Block
from llmprune.streaming.fake_quantize import SCALE as OF_SCALES
from llmprune.streaming.fake_quantize import FakeQuantization

RATE = 0.01  # of a parameter's root mean square, per step
SCALE_RATE = 0.001
"""The same of scales: each moves all weights of its group."""
WHITENING = 0.5
WARM_UP = 0.1
BATCH_TOKENS = 1024
LEAST_WINDOWS = 2
SCALE = 2.0**16
"""Of the loss that is differentiated: a token's part of a mean is less than float16 holds. No other dtype notices."""


@dataclass(frozen=True, slots=True)
class Peers:
    """Who takes part in the reconstruction of a block.

    Args:
        group: the processes; each has some windows of the batches.
        batches: number of batches of all processes together.
    """

    group: ProcessGroup
    batches: int


def batch_tokens(tokens: int) -> int:
    """Tokens per batch for a calibration set of so many: small, because the number of steps counts."""
    return max(min(BATCH_TOKENS, tokens // 16), 1)


def reconstruct_block(
    block: Block, peers: Peers, epochs: int, seed: int = 0, whole: bool = False
) -> BlockReconstruction:
    """Train the kept weights of a pruned block, its norms and biases, towards the dense block's output.

    Adam on float32 masters, batch by batch, with a warm-up and a cosine decay. The step size is a fraction of each
    parameter's root mean square, so it needs no tuning by model. Masks hold exactly: a pruned weight has no gradient.
    One batch in sixteen (at least one) is held out, of the solves too where there are so many; the epoch that did best
    there, with its weights as the file will hold them, is kept, or the block as it was. A step whose gradients are not
    finite is left out. Weights on a grid stay on it, and their scales are trained as well, see `FakeQuantization`.

    Args:
        block: a block of a stream with a dense stream, its groups all solved.
        peers: the processes and batches that take part.
        epochs: passes over the calibration batches.
        seed: of the order of the batches.
        whole: whether all layers are trained, also those that were not solved.
    """
    held_out = validation_batches(peers.batches)
    training = [number for number in range(peers.batches) if number not in held_out]
    values = {name: nn.Parameter(value.detach().float().clone()) for name, value in trainable(block, whole).items()}
    grid = FakeQuantization(block)
    masks = {name: grid.supports.get(name, value != 0) for name, value in values.items() if value.dim() > 1}
    trained = list(values)
    values |= grid.parameters()
    loss = BlockLoss(block, values, peers, grid.applied)
    before = after = loss.mean(held_out)
    if not values or before == 0:
        return BlockReconstruction(block.name, before, after)
    best: dict[str, Tensor] = {}
    skipped_steps = 0
    schedule = Schedule(values, epochs * len(training))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs if training else 0):
        for index in torch.randperm(len(training), generator=generator).tolist():
            gradients = loss.gradients(training[index])
            if not bool(torch.stack([gradient.sum() for gradient in gradients]).isfinite().all()):
                skipped_steps += 1
                continue
            for (name, value), gradient in zip(values.items(), gradients, strict=True):
                value.grad = gradient.mul_(masks[name]) if name in masks else gradient
            schedule.step()
        rounded = grid.rounded(values)
        stored = {name: block.as_stored(name, rounded[name]).float() for name in trained}
        if (reached := loss.mean(held_out, stored)) < after:
            best, after = {name: value.clone() for name, value in (rounded | stored).items()}, reached
    peers.group.broadcast(best.values())
    block.store({name: value for name, value in best.items() if name in trained})
    grid.store(best)
    block.recompute_outputs()
    return BlockReconstruction(block.name, before, after, skipped_steps)


def gradients_of(loss: Tensor, values: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """The gradient of every parameter; zero for one that had no part in the loss (an expert without tokens)."""
    if loss.requires_grad:
        return torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
    return tuple(torch.zeros_like(value) for value in values)


def trainable(block: Block, whole: bool) -> dict[str, nn.Parameter]:
    """The pruned layers' weights, norms and biases, by their names in the block.

    With `whole`, and where channels were removed, all layers' weights; what was removed has no gradient, as nothing
    reads it any more.
    """
    every = whole or block.shrinks
    matrices = {layer.local_parameter for layer in block.linear if not layer.skip} if every else set()
    return {
        name: parameter
        for name, parameter in block.module.named_parameters()
        if f"{block.name}.{name}" in block.changed
        or ((parameter.dim() == 1 or name in matrices) and block.writable(name))
    }


class BlockLoss:
    """Relative squared error of a block's output, token by token: `Σ_c v_c (h_c − t_c)² / Σ_c v_c t_c²`.

    t is the dense block's output. A few channels of the residual stream are hundreds of times larger than the others;
    `v_c = (mean t_c²)^(−WHITENING)` keeps them from being all that counts. A token with t = 0 does not count.

    Args:
        block: the block.
        values: float32 parameters to compute with, by their names in the block.
        peers: the processes and batches that take part.
        applied: what the block computes with, of the parameters.
    """

    def __init__(
        self,
        block: Block,
        values: dict[str, nn.Parameter],
        peers: Peers,
        applied: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
    ) -> None:
        self.block, self.values, self.group, self.applied = block, values, peers.group, applied
        self.batches = {batch.shard.batch: batch for batch in block.batches}
        means = [_dense(batch).square().mean((0, 1)) * batch.shard.weight for batch in block.batches]
        energy = (torch.stack(means).sum(0) / peers.batches).to(block.skeleton.device)
        peers.group.all_reduce([energy])
        self.weights = (energy / energy.mean()).clamp(min=1e-6).pow(-WHITENING)

    def __call__(self, batch: Batch, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """The mean over the tokens of a batch; with other values in place of the parameters, if given."""
        skeleton, call = self.block.skeleton, batch.calls[self.block.index]
        values = {name: value.to(skeleton.compute) for name, value in (values or self.applied(self.values)).items()}

        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.block.module, values, args, kwargs)

        output = batch.axes.stored(hidden_of(call.run(forward, batch.entered().to(skeleton.device))))
        target = _dense(batch).to(skeleton.device)
        missed = ((output.float() - target).square() * self.weights).sum(-1)
        energy = (target.square() * self.weights).sum(-1)
        mean = (missed / energy.masked_fill(energy == 0, torch.inf)).mean()
        assert isinstance(mean, Tensor)
        return mean

    def gradients(self, number: int) -> tuple[Tensor, ...]:
        """Of the mean over the tokens of a batch, in all processes, for every parameter."""
        values, batch = list(self.values.values()), self.batches.get(number)
        found = tuple(torch.zeros_like(value) for value in values)
        if batch is not None:
            with torch.enable_grad():
                found = gradients_of(self(batch) * (batch.shard.weight * SCALE), values)
        self.group.all_reduce(found)
        return tuple(gradient.div_(SCALE) for gradient in found)

    @torch.no_grad()
    def mean(self, numbers: Sequence[int], values: Mapping[str, Tensor] | None = None) -> float:
        """The mean over batches, in all processes; with other values in place of the parameters, if given."""
        here = [self.batches[number] for number in numbers if number in self.batches]
        (total,) = self.group.sum([sum(float(self(batch, values)) * batch.shard.weight for batch in here)])
        return total / len(numbers)


def _dense(batch: Batch) -> Tensor:
    assert batch.dense is not None
    return batch.dense.float()


class Schedule:
    """Adam with a step size that rises linearly, then falls as a cosine.

    Args:
        values: the parameters.
        steps: how many steps there will be.
    """

    def __init__(self, values: dict[str, nn.Parameter], steps: int) -> None:
        self.steps, self.done = steps, 0
        self.rates = [
            (SCALE_RATE if name.endswith(OF_SCALES) else RATE) * _rms(value) for name, value in values.items()
        ]
        groups = [{"params": [value], "lr": rate} for value, rate in zip(values.values(), self.rates, strict=True)]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)

    def step(self) -> None:
        """One step along the gradients."""
        progress = (self.done + 0.5) / self.steps
        factor = min(progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.done += 1


def _rms(value: Tensor) -> float:
    kept = value[value != 0]
    return float(kept.detach().square().mean().sqrt()) if kept.numel() else 0.0
