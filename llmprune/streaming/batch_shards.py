"""Which windows of the calibration text a process has, and where they stand in the batches."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.pruning.statistics import HELD_OUT

JUDGES = 16
"""One batch in so many is left to judge blocks by that are trained."""


def judges(batches: int) -> range:
    """The batches that a trained block is judged by; of fewer than `JUDGES`, one."""
    return range(JUDGES // 2, batches, JUDGES) or range(batches - 1, batches)


def unfitted(batches: int) -> frozenset[int]:
    """The batches that the solves do not see where blocks are trained: the judges, if there are batches enough.

    A window that the weights were fitted to is no judge: training gains less on it than on any other text.
    """
    return frozenset(judges(batches)) if batches >= JUDGES else frozenset()


@dataclass(frozen=True, slots=True)
class Part:
    """What one process has of a batch.

    Args:
        batch: number of the batch.
        whole: how many windows it has in all.
        own: which of them are here, rising.
    """

    batch: int
    whole: int
    own: tuple[int, ...]

    @property
    def share(self) -> float:
        """Of the batch."""
        return len(self.own) / self.whole

    def fitted(self, length: int) -> int:
        """How many of the tokens here statistics are fitted to; those behind them are held out, as of a whole batch.

        Args:
            length: of a window.
        """
        tokens = self.whole * length
        cut = tokens - int(HELD_OUT * tokens)
        return sum(min(max(cut - at * length, 0), length) for at in self.own)


def parts(windows: int, batch: int, number: int = 0, size: int = 1) -> list[Part]:
    """A process's parts of all batches, without those it has nothing of.

    Windows are dealt out in turn, so that every process has some of every batch, as far as that goes.

    Args:
        windows: of the whole text.
        batch: windows in a batch; the last may have fewer.
        number: of the process.
        size: how many processes there are.
    """
    found = []
    for start in range(0, windows, batch):
        whole = min(batch, windows - start)
        own = tuple(at for at in range(whole) if (start + at) % size == number)
        found += [Part(start // batch, whole, own)] if own else []
    return found
