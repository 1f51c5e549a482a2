"""What is known of the blocks of a dense model when some of them are to be removed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockUse:
    """What blocks do to the residual stream of the dense model.

    Args:
        influence: block influence of every block, `(blocks,)`, float64: the mean over tokens of 1 - cosine of what
            enters and what leaves it.
        repaired: `(blocks, longest)`, float64: the error of the stream behind a run of blocks that is removed and
            compensated by the block before it, relative to the stream, mean over tokens; of the run that begins at the
            row's block and has one block more than the column's number. Infinite where there is no such run.
    """

    influence: Tensor
    repaired: Tensor
