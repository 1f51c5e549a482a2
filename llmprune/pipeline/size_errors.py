"""Measures what every way to make a model smaller costs the residual stream, before a size is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce

import torch
from torch import Tensor

from llmprune.pipeline.context import RunContext
from llmprune.pipeline.size_options import Options, saved_by_block
from llmprune.pipeline.size_trial import sample_of
from llmprune.progress import Progress
from llmprune.pruning.blocks.problem import BlockUse
from llmprune.pruning.blocks.repair import Repair
from llmprune.pruning.criteria.scores import Wanda
from llmprune.pruning.sizes import Channels, Depth, Heads, SizeErrors
from llmprune.runtime.oom import with_oom_retry
from llmprune.streaming.block_use import block_use, longest_run
from llmprune.streaming.stream import BATCH_TOKENS, BlockStream, Observe, Resources
from llmprune.streaming.width_use import width_use
from llmprune.structure.cut import Cut, Structure


def size_errors(
    run: RunContext, options: Options, size: Fraction, progress: Progress
) -> tuple[SizeErrors, tuple[str, ...]]:
    """The errors of the residual stream for numbers of blocks and of heads, and curves of the channels.

    Two passes over the dense model: `width_use` with the criterion `Wanda`, and `block_use`.

    Args:
        run: a job with this model, of whose calibration windows a few are used.
        options: what the model can lose.
        size: the ratio of the block parameters that is to be left; so many blocks at most are removed.
        progress: of the passes.

    Returns:
        the errors, and the full names of all layers that add to the residual stream.

    Raises:
        InputError: layers that lose inputs do not add to the residual stream.
    """
    sample, total = sample_of(run), len(run.skeleton.blocks)
    length = sample.shape[1]
    most = min(-int(-(1 - size) * total // 1), total - 1) if options.blocks else 0
    cuts = _cuts(options.structures)

    def attempt(at_once: int) -> tuple[BlockUse | None, tuple[str, ...], dict[str, list[float]]]:
        resources, use, adders = Resources(at_once * length), None, tuple[str, ...]()
        progress.start("measuring parts", total * (bool(most) + bool(cuts)))
        errors: dict[str, list[float]] = {}
        if cuts:
            observe = Observe(frozenset(cuts), dense_stream=True, removed={name: own[0] for name, own in cuts.items()})
            errors = width_use(BlockStream(run.skeleton, sample, observe, resources), cuts, Wanda(), progress.step)
        if most:
            stream = BlockStream(run.skeleton, sample, Observe(run.plan.names), resources)
            use, adders = block_use(stream, longest_run(total, most), progress.step)
        progress.finish()
        return use, adders, errors

    use, adders, errors = with_oom_retry(attempt, min(max(BATCH_TOKENS // length, 1), len(sample)), progress)
    depths = [Depth(0.0, ()), *(Depth(*Repair().best(use, count)) for count in range(1, most + 1) if use is not None)]
    found, number = _by_block(run, options.structures, errors), len(options.heads)
    heads, channels = _heads(run, options.heads, found[:number]), _channels(run, options.channels, found[number:])
    return SizeErrors(depths, heads, channels), adders


def _cuts(structures: Sequence[Structure]) -> dict[str, list[Cut]]:
    """The cuts of all structures by the full name of their layer."""
    found: dict[str, list[Cut]] = {}
    for structure in structures:
        for cut in structure.cuts:
            found.setdefault(cut.name, []).append(cut)
    return found


def _by_block(run: RunContext, structures: Sequence[Structure], errors: dict[str, list[float]]) -> list[Tensor]:
    """For every structure, the errors of all blocks, summed over their layers, `(blocks,)`, float64."""
    numbers = {run.skeleton.block_name(index): index for index in range(len(run.skeleton.blocks))}
    found = [torch.zeros(len(numbers), dtype=torch.float64) for _ in structures]
    left = {name: iter(values) for name, values in errors.items()}
    for own, structure in zip(found, structures, strict=True):
        for cut in structure.cuts:
            own[numbers[cut.block]] += next(left[cut.name])
    return found


def _heads(run: RunContext, structures: Sequence[Structure], errors: Sequence[Tensor]) -> list[Heads]:
    nothing = torch.zeros(len(run.skeleton.blocks), dtype=torch.float64)
    ways = enumerate(zip(errors, structures, strict=True))
    return [
        Heads(nothing, nothing, -1),
        *(Heads(found, saved_by_block(one, run.skeleton), number) for number, (found, one) in ways),
    ]


def _channels(run: RunContext, structures: Sequence[Structure], errors: Sequence[Tensor]) -> Channels | None:
    if not structures:
        return None
    ratios = [float(structure.ratios["channels"]) for structure in structures]
    saved = saved_by_block(structures[-1], run.skeleton) / ratios[-1]
    step = reduce(_common, (1 - structure.ratios["channels"] for structure in structures))
    return Channels(tuple(ratios), torch.stack(list(errors), dim=1), saved, float(step))


def _common(one: Fraction, other: Fraction) -> Fraction:
    """The largest fraction of which both are multiples."""
    shared = one.denominator * other.denominator
    return Fraction(math.gcd(one.numerator * other.denominator, other.numerator * one.denominator), shared)
