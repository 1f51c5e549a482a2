"""The criterion that asks the regression: runs of blocks whose removal the block before them compensates best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from llmprune.pruning.blocks import BlockCriterion
from llmprune.pruning.blocks.problem import BlockUse


@dataclass(frozen=True, slots=True)
class Repair(BlockCriterion):
    """Removes the runs of blocks with the least sum of errors that are left after the repair, see `BlockUse`.

    Runs are apart by at least one block that stays, so each has a block before it that compensates. All sets of runs
    are considered, by dynamic programming over the blocks: `best(b, n)`, the least sum of n removals from block b on,
    is the least of `best(b + 1, n)` and of `error(b, k) + best(b + k + 1, n - k)` over the lengths k. Errors of several
    runs are taken to add up.
    """

    def select(self, use: BlockUse, count: int) -> tuple[int, ...]:
        """See `BlockCriterion`."""
        return self.best(use, count)[1]

    def best(self, use: BlockUse, count: int) -> tuple[float, tuple[int, ...]]:
        """The least sum of errors with `count` blocks removed, infinite where there is no such set, and the blocks."""
        errors = use.repaired.tolist()
        total = len(errors)

        @cache
        def best(block: int, left: int) -> tuple[float, tuple[int, ...]]:
            if left == 0:
                return 0.0, ()
            if block >= total:
                return math.inf, ()
            found = best(block + 1, left)
            for length in range(1, min(left, total - block, len(errors[block])) + 1):
                behind, removed = best(block + length + 1, left - length)
                if (error := errors[block][length - 1] + behind) < found[0]:
                    found = error, (*range(block, block + length), *removed)
            return found

        return best(1, count)
