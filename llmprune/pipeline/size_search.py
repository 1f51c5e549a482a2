"""Looks for the blocks, heads and channels whose removal costs least, by trying some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from llmprune.errors import InputError
from llmprune.pipeline.size_options import Options, block_sizes
from llmprune.pipeline.size_trial import Trial
from llmprune.progress import Progress
from llmprune.pruning.sizes import Cost, SizeChoice, SizeErrors, choose
from llmprune.pruning.sparsity import Kind, Removal, Sparsity, size_name

SLACK = Fraction(1, 2000)
"""A size counts as met where what is left rounds to it: norms are not to cost the MLP a whole step."""
FINEST, STEPS = 1000, 64
"""A ratio of channels has a whole number of thousandths; it is raised in so many steps until the size is met."""


@dataclass(slots=True)
class SizeSearch:
    """Looks for the removals of a size that cost least.

    Args:
        options: what the model can lose.
        goal: the size.
        errors: of the residual stream, for every kind of removal.
        trial: measures removals.
        progress: told what was found.
        tried: by name, the divergences of the removals that were measured.
    """

    options: Options
    goal: Sparsity
    errors: SizeErrors
    trial: Trial
    progress: Progress
    tried: dict[str, float] = field(default_factory=dict)

    def removals(self) -> list[Removal]:
        """Of all removals that were tried and meet the size, those with the least divergence.

        Each kind is tried alone, as far as the size or the kind goes, and half of that; between and below, its
        divergence is taken for a power of the errors. The choice with the least sum of these is tried as well.
        """
        found: dict[str, list[Removal]] = {}
        costs: dict[Kind, Cost] = {}
        for kind in self.options.kinds:
            own = self.errors.only(kind)
            choice = self.best(own)
            most = choice or _part(own, 1)
            removals = self._removals(most, meets=choice is not None)
            points = [(most.cost, self._measured(removals, most))]
            if choice is not None:
                found[_name(removals)] = removals
            less = _part(own, 0.5, most)
            if 0 < less.cost < most.cost:
                points.append((less.cost, self._measured(self._removals(less, meets=False), less)))
            costs[kind] = Cost.through(*points)
        mixed = self.best(self.errors, costs)
        assert mixed is not None
        removals = self._removals(mixed)
        self._measured(removals, mixed)
        found[_name(removals)] = removals
        name = min(found, key=lambda name: self.tried[name])
        others = ", ".join(f"{other} {cost:.3f}" for other, cost in self.tried.items() if other != name)
        self.progress.note(
            f"{self.goal.name}: {name}; divergence from the dense model on a few held-out windows "
            f"{self.tried[name]:.3f} nats a token" + (f" ({others})" if others else "")
        )
        return found[name]

    def best(self, errors: SizeErrors, costs: dict[Kind, Cost] | None = None) -> SizeChoice | None:
        """The choice with the least cost."""
        assert self.goal.size is not None
        return choose(float(self.goal.size + SLACK), block_sizes(self.options.plan.skeleton), errors, costs)

    def _measured(self, removals: list[Removal], choice: SizeChoice) -> float:
        name = _name(removals)
        if name not in self.tried:
            self.tried[name] = self.trial(removals, choice.depth.removed, self.progress)
        return self.tried[name]

    def _removals(self, choice: SizeChoice, meets: bool = True) -> list[Removal]:
        """The removals of a choice; where it meets the size, with the least ratio of channels by which it does."""
        skeleton, size = self.options.plan.skeleton, self.goal.size
        blocks, fixed = len(choice.depth.removed), list[Removal]()
        assert size is not None
        if blocks:
            fixed.append(Removal("blocks", Fraction(blocks, len(skeleton.blocks)), blocks))
        if choice.heads.number >= 0:
            fixed.append(Removal("heads", _named(self.options.heads[choice.heads.number].ratios["heads"])))
        if not choice.ratio:
            return fixed
        if not meets:
            return [*fixed, Removal("channels", _named(choice.ratio))]
        total, start = sum(block_sizes(skeleton)), math.ceil(choice.ratio * FINEST)
        for step in range(STEPS):
            removals = [*fixed, Removal("channels", Fraction(start + step * FINEST // STEPS, FINEST))]
            try:
                left = total - self.options.plan(removals).removed_parameters(skeleton)
            except InputError:
                continue  # so few channels round to none
            if left <= (size + SLACK) * total:
                return removals
        raise InputError(
            f"no number of channels leaves {size_name(size)} of the block parameters",
            "choose another size, or finer steps: --round-to 16",
        )


def _named(ratio: Fraction | float) -> Fraction:
    """A ratio that its name gives exactly; plans take the number of parts next to it."""
    return Fraction(round(ratio * FINEST), FINEST)


def _part(errors: SizeErrors, part: float, of: SizeChoice | None = None) -> SizeChoice:
    """A part of a choice of one kind, or of all that can be removed; its cost is the error of the residual stream."""
    depth, heads, channels = errors.depths[-1], errors.heads[-1], errors.channels
    ratio = 0.0 if channels is None else channels.ratios[-1]
    most = of or SizeChoice(depth, heads, ratio, math.inf)
    depth = errors.depths[int(part * len(most.depth.removed))]
    heads = errors.heads[int(part * (most.heads.number + 1))]
    everywhere = torch.ones(len(heads.errors), dtype=torch.bool)
    ratio = 0.0 if channels is None else channels.possible(part * most.ratio)
    cost = 0.0 if channels is None else channels.error(ratio, everywhere)
    return SizeChoice(depth, heads, ratio, depth.error + float(heads.errors.sum()) + cost)


def _name(removals: Sequence[Removal]) -> str:
    return Sparsity((), None).chosen(removals).name
