"""The criterion of ShortGPT: blocks that change the direction of the residual stream least."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.pruning.blocks import BlockCriterion
from llmprune.pruning.blocks.problem import BlockUse


@dataclass(frozen=True, slots=True)
class Influence(BlockCriterion):
    """Removes the blocks of least influence `1 - mean cos(x, block(x))`, each on its own (ShortGPT, Men et al. 2024).

    Differs from ShortGPT: the first block stays.
    """

    def select(self, use: BlockUse, count: int) -> tuple[int, ...]:
        """See `BlockCriterion`."""
        order = use.influence[1:].argsort(stable=True) + 1
        return tuple(sorted(order[:count].tolist()))
