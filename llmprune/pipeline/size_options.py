"""The ways in which a model can get smaller, each planned on its own: numbers of heads, and widths of the MLP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.skeleton import Skeleton
from llmprune.pipeline.context import RunContext
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.sparsity import Kind, Removal
from llmprune.streaming.block_gap import check_separate
from llmprune.streaming.block_types import all_couplings, block_runs
from llmprune.structure.cut import Structure
from llmprune.structure.expert_coupling import has_experts
from llmprune.structure.expert_plan import BlockRuns
from llmprune.structure.plan import BlockCouplings, head_ratios, plan_structure

MOST_HEADS = Fraction(1, 2)
"""More of the heads are not considered."""
CHANNEL_RATIOS = (Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4))
"""The error of the channels is measured at these ratios, or what they are rounded to."""


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans removals of one model, whose blocks are analysed once.

    Args:
        skeleton: the model.
        couplings: of its blocks.
        runs: calls of its blocks.
        round_to: numbers of channels are multiples of this; None for the usual.
        pattern: of the kept weights, or None.
        trust: whether code that comes with the model may run.
    """

    skeleton: Skeleton
    couplings: BlockCouplings
    runs: BlockRuns
    round_to: int | None
    pattern: SparsityPattern | None
    trust: bool

    def __call__(self, removals: Sequence[Removal]) -> Structure:
        """The structure that is left.

        Raises:
            InputError: the model cannot lose that.
        """
        return plan_structure(
            self.skeleton, removals, self.couplings, self.runs, self.round_to, self.pattern, self.trust
        )


@dataclass(frozen=True, slots=True)
class Options:
    """What a model can lose.

    Args:
        plan: plans removals.
        heads: one structure for every number of heads.
        channels: one for every ratio of channels, rising.
        blocks: whether it can lose blocks.
    """

    plan: Planner
    heads: tuple[Structure, ...]
    channels: tuple[Structure, ...]
    blocks: bool

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of parts that can be lost."""
        found: dict[Kind, object] = {"blocks": self.blocks, "channels": self.channels, "heads": self.heads}
        return [kind for kind, there in found.items() if there]

    @property
    def structures(self) -> tuple[Structure, ...]:
        """All structures with fewer heads, then all with fewer channels."""
        return self.heads + self.channels


def options_of(run: RunContext, round_to: int | None = None) -> Options:
    """What the model of a job can lose, as far as its config says so.

    Args:
        run: any job with this model.
        round_to: numbers of channels are multiples of this; None for the usual.

    Raises:
        InputError: it has experts, or can lose nothing.
    """
    skeleton, job = run.skeleton, run.job
    if any(has_experts(block) for block in skeleton.blocks):
        raise InputError(
            f"{skeleton.config.model_type!r} has experts, whose removal is not weighed against that of other parts",
            "name what is to go: experts:25%, channels:25%, heads:25%, blocks:20%, or several of them with +",
        )
    tokens = torch.arange(64)[None] % skeleton.config.get_text_config().vocab_size
    couplings, runs = all_couplings(skeleton, tokens), block_runs(skeleton, tokens)
    plan = Planner(skeleton, couplings, runs, round_to, run.pattern, job.trust_remote_code)
    reasons: dict[Kind, str] = {}
    heads = _planned(plan, "heads", [r for r in head_ratios(couplings) if r <= MOST_HEADS], reasons)
    channels = _planned(plan, "channels", CHANNEL_RATIOS, reasons)
    blocks = len(skeleton.blocks) > 1
    try:
        check_separate(skeleton, tokens)
        plan([Removal("blocks", Fraction(1, len(skeleton.blocks)), 1)])
    except InputError as error:
        blocks, reasons["blocks"] = False, error.message
    found = Options(plan, heads, channels, blocks)
    if not found.kinds:
        raise InputError(f"the model cannot get smaller: {'; '.join(reasons.values())}", "remove weights: 2:4 or 50%")
    return found


def _planned(plan: Planner, kind: Kind, ratios: Sequence[Fraction], reasons: dict[Kind, str]) -> tuple[Structure, ...]:
    """One structure for every different number of parts that is left."""
    found: dict[Fraction, Structure] = {}
    for ratio in ratios:
        try:
            structure = plan([Removal(kind, ratio)])
        except InputError as error:
            reasons[kind] = error.message
            continue
        found.setdefault(structure.ratios[kind], structure)
    if found:
        reasons.pop(kind, None)
    return tuple(found[ratio] for ratio in sorted(found))


def saved_by_block(structure: Structure, skeleton: Skeleton) -> Tensor:
    """Parameters that every block loses, `(blocks,)`, float64."""
    shapes = structure.shapes(skeleton)
    return torch.tensor(
        [
            sum(before - math.prod(shapes[name]) for name, before in sizes.items() if name in shapes)
            for sizes in _sizes(skeleton)
        ],
        dtype=torch.float64,
    )


def block_sizes(skeleton: Skeleton) -> list[int]:
    """Number of parameters of every block."""
    return [sum(sizes.values()) for sizes in _sizes(skeleton)]


def _sizes(skeleton: Skeleton) -> Iterator[dict[str, int]]:
    """Number of elements of the parameters of every block, by full name."""
    for index, block in enumerate(skeleton.blocks):
        name = skeleton.block_name(index)
        yield {f"{name}.{local}": parameter.numel() for local, parameter in block.named_parameters()}
