"""The table of criteria by which whole blocks are removed: name -> where its class is, and one line of help.

A criterion is a frozen dataclass derived from `BlockCriterion`; `select(use, count)` chooses the blocks that go. Adding
one: a class here, one line in the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from llmprune.pruning.methods import TableEntry, load_entry

if TYPE_CHECKING:
    from llmprune.pruning.blocks.problem import BlockUse


class BlockCriterion(ABC):
    """What every criterion does."""

    __slots__ = ()

    @abstractmethod
    def select(self, use: BlockUse, count: int) -> tuple[int, ...]:
        """The numbers of the `count` blocks that are removed, rising; the first block never is."""


BLOCK_CRITERIA = {
    "repair": TableEntry(
        "llmprune.pruning.blocks.repair:Repair",
        "runs of blocks that the block before them compensates best, by least squares",
    ),
    "influence": TableEntry(
        "llmprune.pruning.blocks.influence:Influence", "smallest 1 - cosine of a block's input and output (ShortGPT)"
    ),
}


def load_block_criterion(name: str, options: Mapping[str, str] | None = None) -> BlockCriterion:
    """Instantiate a criterion of the table.

    Args:
        name: its name.
        options: values for its fields, as text; the others keep their defaults.

    Raises:
        InputError: it has no such option, or the value is no positive number.
    """
    return cast("BlockCriterion", load_entry(name, BLOCK_CRITERIA[name], options))
