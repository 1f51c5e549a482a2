"""Divides calibration windows among batches and processes, and holds batches out for validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from llmprune.pruning.statistics import HELD_OUT

VALIDATION_EVERY = 16
"""One batch in so many is held out for validation where blocks are reconstructed."""


def validation_batches(batches: int) -> range:
    """The batches on which a reconstructed block is validated; of fewer than `VALIDATION_EVERY`, one."""
    return range(VALIDATION_EVERY // 2, batches, VALIDATION_EVERY) or range(batches - 1, batches)


def held_out_batches(batches: int) -> frozenset[int]:
    """The batches that are left out of the solves where blocks are reconstructed: the validation batches, if enough.

    A window that the weights were fitted to does not validate: training gains less on it than on any other text.
    """
    return frozenset(validation_batches(batches)) if batches >= VALIDATION_EVERY else frozenset()


@dataclass(frozen=True, slots=True)
class Shard:
    """The windows of one batch that a process has.

    Args:
        batch: number of the batch.
        windows: number of windows of the whole batch.
        own: positions of this process's windows in it, rising.
    """

    batch: int
    windows: int
    own: tuple[int, ...]

    @property
    def weight(self) -> float:
        """Fraction of the batch's windows."""
        return len(self.own) / self.windows

    def fitted(self, length: int) -> int:
        """Number of this process's tokens that are fitted to; those behind them are held out, as of a whole batch.

        Args:
            length: tokens per window.
        """
        return self.fitted_rows([length] * self.windows)

    def fitted_rows(self, rows: Sequence[int]) -> int:
        """Number of this process's rows that are fitted to, where windows have unequally many.

        Args:
            rows: number of rows of every window of the whole batch, those of other processes too.
        """
        cut = sum(rows) - int(HELD_OUT * sum(rows))
        before = [0, *accumulate(rows)]
        return sum(min(max(cut - before[at], 0), rows[at]) for at in self.own)


@dataclass(frozen=True, slots=True)
class BatchSharding:
    """Distributes windows round-robin, so that every process has some of every batch, if there are enough.

    Args:
        windows: of the whole calibration text.
        batch_size: windows in a batch; the last may have fewer.
        rank: of this process.
        world_size: number of processes.
    """

    windows: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def batches(self) -> int:
        """Number of batches of all processes together."""
        return -(-self.windows // self.batch_size)

    @property
    def own(self) -> slice:
        """The windows of this process; processes differ by one window at most."""
        return slice(self.rank, None, self.world_size)

    def shards(self) -> list[Shard]:
        """This process's shards of all batches, without those that it has no window of."""
        found = []
        for start in range(0, self.windows, self.batch_size):
            size = min(self.batch_size, self.windows - start)
            own = tuple(at for at in range(size) if (start + at) % self.world_size == self.rank)
            found += [Shard(start // self.batch_size, size, own)] if own else []
        return found


def whole_batches(windows: int, batch_size: int) -> list[Shard]:
    """The shards of a single process."""
    return BatchSharding(windows, batch_size).shards()
