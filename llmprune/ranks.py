"""Several processes at one model: each has its share of the calibration windows, and solves its share of the rows.

Sums over windows are sums over processes, so all see the same statistics, and all write the same weights into their
blocks. The first process alone reads, writes and reports everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from llmprune.errors import PruneError
from llmprune.pattern import NM, SparsityPattern
from llmprune.problem import GroupProblem, InputStats, LayerSolution

T = TypeVar("T")
Solve = Callable[[GroupProblem, SparsityPattern], list[LayerSolution]]

FIELDS = ("gram", "cross", "dense", "missed", "quiet")


class Ranks:
    """The processes of a run.

    Args:
        number: of this process, from 0.
        size: how many there are.

    Attributes:
        rows: how many rows every process has solved so far.
    """

    def __init__(self, number: int = 0, size: int = 1) -> None:
        self.number, self.size = number, size
        self.rows = [0] * size

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    def share(self, tokens: Tensor, number: int | None = None) -> Tensor:
        """A process's windows, by default this one's; shares differ by one window at most."""
        return torch.tensor_split(tokens, self.size)[self.number if number is None else number]

    def meet(self) -> None:
        """Wait until all processes are here."""
        if not self.alone:
            with _together():
                distributed.barrier()

    def in_turn(self, work: Callable[[], T]) -> T:
        """Let the first process work, and then the others: they find in the cache what it has fetched."""
        if self.number:
            self.meet()
        result = work()
        if not self.number:
            self.meet()
        return result

    def of_first(self, value: T) -> T:
        """The first process's value, for all."""
        if self.alone:
            return value
        box: list[Any] = [value.cpu() if isinstance(value, Tensor) else value]
        with _together():
            distributed.broadcast_object_list(box)
        result: T = box[0]
        return result

    def summed(self, stats: InputStats, layers: list[str]) -> InputStats:
        """Statistics over the windows of all processes, from those over each one's own.

        Args:
            stats: of this process's windows.
            layers: the names of the layers that they are for.

        Raises:
            PruneError: the processes are at different layers, or one has ended.
        """
        if self.alone:
            return stats
        heads = self._gathered({"layers": layers, "stats": _head(stats)})
        if any(head["layers"] != layers for head in heads):
            others = next(head["layers"] for head in heads if head["layers"] != layers)
            raise PruneError(
                f"the blocks take {layers} in one process and {others} in another",
                "a model that routes tokens this way cannot be spread: use one process",
            )
        return self._sum(stats, [head["stats"] for head in heads])

    def spread(self, solve: Solve, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Solve a group together: every process its rows where these do not depend on each other, else whole layers.

        Args:
            solve: of a method.
            problem: the same in all processes.
            pattern: what the weights must hold.
        """
        if self.alone:
            return solve(problem, pattern)
        pieces = self._pieces(problem, pattern)
        mine = [(layer, rows) for layer, rows, owner in pieces if owner == self.number]
        layers = tuple(
            replace(problem.layers[layer], weight=problem.layers[layer].weight[rows]) for layer, rows in mine
        )
        found = iter(solve(replace(problem, layers=layers), pattern) if layers else [])
        parts: list[list[LayerSolution]] = [[] for _ in problem.layers]
        for layer, rows, owner in pieces:
            weight = problem.layers[layer].weight[rows]
            own = next(found) if owner == self.number else LayerSolution(weight, torch.zeros_like(weight).bool())
            parts[layer].append(self._from(owner, own))
        return [_joined(solutions) for solutions in parts]

    def agreed(self, solutions: list[LayerSolution]) -> list[LayerSolution]:
        """The first process's solutions, for all: machines may differ in the last bit, weights may not."""
        return solutions if self.alone else [self._from(0, solution) for solution in solutions]

    def facts(self, tokens: Tensor) -> dict[str, Any]:
        """For the report: how many processes, and every one's tokens and rows; nothing where there is one."""
        if self.alone:
            return {}
        shares = [self.share(tokens, number).numel() for number in range(self.size)]
        return {"size": self.size, "tokens": shares, "rows": list(self.rows)}

    def _pieces(self, problem: GroupProblem, pattern: SparsityPattern) -> list[tuple[int, slice, int]]:
        """Layer, rows and process of every piece; all processes come to the same."""
        pieces = []
        for layer, part in enumerate(problem.layers):
            height = len(part.weight)
            if isinstance(pattern, NM) or getattr(pattern, "scope", "layer") == "row":
                ends = [height * number // self.size for number in range(self.size + 1)]
                pieces += [(layer, slice(ends[n], ends[n + 1]), n) for n in range(self.size) if ends[n] < ends[n + 1]]
            else:
                # A count over a whole layer cannot be cut; who has done least so far is next.
                pieces.append((layer, slice(0, height), self.rows.index(min(self.rows))))
            for at, rows, owner in pieces:
                if at == layer:
                    self.rows[owner] += rows.stop - rows.start
        return pieces

    def _from(self, owner: int, solution: LayerSolution) -> LayerSolution:
        weight, mask = solution.weight.contiguous(), solution.mask.to(torch.uint8).contiguous()
        rest = [(solution.status, solution.stats)]
        with _together():
            distributed.broadcast(weight, owner)
            distributed.broadcast(mask, owner)
            distributed.broadcast_object_list(rest, owner)
        return LayerSolution(weight, mask.bool(), *rest[0])

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with _together():
            distributed.all_gather_object(values, value)
        return values

    def _sum(self, stats: InputStats, heads: list[dict[str, Any]]) -> InputStats:
        tokens = sum(head["tokens"] for head in heads)
        found: dict[str, Any] = {"tokens": tokens, "scale": stats.scale}
        counted = [head for head in heads if head["tokens"]]
        for name in FIELDS:
            # A process without a token has nothing to say; one that has some, but not this, makes it useless.
            shapes = [head["shapes"].get(name) for head in counted or heads]
            value: Tensor | None = getattr(stats, name)
            if any(shape is None for shape in shapes):
                found[name] = None
                continue
            part = stats.gram.new_zeros(shapes[0]) if value is None else value * (stats.tokens / max(tokens, 1))
            with _together():
                distributed.all_reduce(part)
            found[name] = part
        held = [head["held"] for head in counted or heads]
        found["held"] = None
        if all(held):
            own = stats.held or InputStats(0, stats.gram.new_zeros(stats.gram.shape))
            found["held"] = self._sum(own, [head["held"] or _head(InputStats(0, own.gram)) for head in heads])
        return InputStats(**found)


ALONE = Ranks()


def _head(stats: InputStats) -> dict[str, Any]:
    """What the others must know to add these statistics to theirs."""
    values = {name: getattr(stats, name) for name in FIELDS}
    shapes = {name: tuple(value.shape) for name, value in values.items() if value is not None}
    return {"tokens": stats.tokens, "shapes": shapes, "held": None if stats.held is None else _head(stats.held)}


def _joined(parts: list[LayerSolution]) -> LayerSolution:
    """One layer from its rows; of several statuses the worst."""
    worst = max(parts, key=lambda part: part.stats.get("damping_raises", 0.0))
    weight, mask = torch.cat([part.weight for part in parts]), torch.cat([part.mask for part in parts])
    return LayerSolution(weight, mask, worst.status, worst.stats)


@contextmanager
def _together() -> Iterator[None]:
    """What goes wrong within is that another process is no longer there."""
    try:
        yield
    except RuntimeError as error:
        raise PruneError("another process of this run has ended", "its own error says why") from error
