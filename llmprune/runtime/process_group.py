"""Several processes at one model: each has its share of the calibration windows, and solves its share of the rows.

Sums over windows are sums over processes, so all see the same statistics, and all write the same weights into their
blocks. The first process alone reads, writes and reports everything else.

Every exchange begins with words, short JSON of any length, from each process to all; tensors follow, whose shapes are
then known. A process whose device is out of memory says that in place of its words, and all begin again together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from llmprune.errors import PruneError
from llmprune.pruning.pattern import NM, SparsityPattern
from llmprune.pruning.problem import GroupProblem, InputStats, LayerSolution, Status
from llmprune.streaming.batch_shards import Part, parts

T = TypeVar("T")
Solve = Callable[[GroupProblem, SparsityPattern], list[LayerSolution]]

FIELDS = ("gram", "cross", "dense", "missed", "given", "energy", "quiet")
NO_ROOM = "no room"


class NoRoomError(Exception):
    """Another process's device is out of memory."""


class DesertedError(PruneError):
    """Another process has ended; what it says is what went wrong."""


class Ranks:
    """The processes of a run.

    Args:
        number: of this process, from 0.
        size: how many there are.
        device: where what they tell each other travels.

    Attributes:
        rows: how many rows every process has solved so far.
    """

    def __init__(self, number: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.number, self.size, self.device = number, size, torch.device(device)
        self.rows = [0] * size

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    # Words

    def exchange(self, words: T) -> list[T]:
        """What every process says, in order; JSON. Waits until all have spoken.

        Raises:
            NoRoomError: one has no memory left on its device.
        """
        if self.alone:
            return [words]
        return self._exchange({"words": words})

    def out_of_room(self) -> None:
        """Say, in place of what the others wait for, that this process's device has no memory left."""
        if not self.alone:
            try:
                self._exchange({NO_ROOM: True})
            except NoRoomError:
                pass

    def meet(self) -> None:
        """Wait until all processes are here."""
        self.exchange(None)

    def part(self) -> None:
        """Wait until all processes are done."""
        if not self.alone:
            with _together():
                # Unlike words, it leaves no tensor to a thread that may outlive the interpreter.
                distributed.barrier()

    def in_turn(self, work: Callable[[], T]) -> T:
        """Let the first process work, and then the others: they find in the cache what it has fetched."""
        if self.number:
            self.meet()
        result = work()
        if not self.number:
            self.meet()
        return result

    def of_first(self, words: T) -> T:
        """The first process's words, for all."""
        return self.exchange(words if self.number == 0 else None)[0]  # type: ignore[return-value]

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, bit for bit the same in all."""
        return [sum(column) for column in zip(*self.exchange(list(values)), strict=True)]

    # Windows

    def share(self, tokens: Tensor, number: int | None = None) -> Tensor:
        """A process's windows, by default this one's; shares differ by one window at most."""
        return tokens[self.number if number is None else number :: self.size]

    def parts(self, windows: int, batch: int) -> list[Part]:
        """What this process has of every batch, see `shares.parts`."""
        return parts(windows, batch, self.number, self.size)

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
        words: dict[str, Any] = {"layers": layers, "stats": _head(stats)}
        heads = self.exchange(words)
        if other := next((head["layers"] for head in heads if head["layers"] != layers), None):
            raise PruneError(
                f"the blocks take {layers} in one process and {other} in another",
                "a model that routes tokens this way cannot be spread: use one process",
            )
        return self._sum(stats, [head["stats"] for head in heads])

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over the processes, in place."""
        if self.alone:
            return
        self.meet()
        for tensor in tensors:
            with _together():
                distributed.all_reduce(tensor)

    # Rows

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
        found = solve(replace(problem, layers=layers), pattern) if layers else []
        said = [iter(heads) for heads in self.exchange([_words(solution) for solution in found])]
        own = iter(found)
        parts: list[list[LayerSolution]] = [[] for _ in problem.layers]
        for layer, rows, owner in pieces:
            like = problem.layers[layer].weight[rows]
            parts[layer].append(self._from(owner, next(own) if owner == self.number else None, like, next(said[owner])))
        return [_joined(solutions) for solutions in parts]

    def by_rows(self, compute: Callable[[slice], Tensor], height: int) -> Tensor:
        """What is computed row by row, every process its share of them.

        Args:
            compute: the result for some of the rows.
            height: how many there are.
        """
        if self.alone:
            return compute(slice(0, height))
        cuts = self._cuts(height)
        mine = compute(cuts[self.number]).contiguous()
        self.meet()
        found = [
            mine if owner == self.number else mine.new_empty(rows.stop - rows.start, *mine.shape[1:])
            for owner, rows in enumerate(cuts)
        ]
        for owner, part in enumerate(found):
            self._broadcast(part, owner)
        return torch.cat(found)

    def own_rows(self, height: int) -> slice:
        """This process's share of so many rows."""
        return self._cuts(height)[self.number]

    # The first process's

    def agreed(self, solutions: list[LayerSolution]) -> list[LayerSolution]:
        """The first process's solutions, for all: machines may differ in the last bit, weights may not."""
        if self.alone:
            return solutions
        heads = self.of_first([_words(solution) for solution in solutions])
        return [self._from(0, own, own.weight, head) for own, head in zip(solutions, heads, strict=True)]

    def same(self, tensors: Iterable[Tensor]) -> None:
        """Make tensors those of the first process, in place."""
        if self.alone:
            return
        self.meet()
        for tensor in tensors:
            self._broadcast(tensor, 0)

    def same_order(self, order: Tensor | None) -> Tensor | None:
        """The first process's order of inputs."""
        if self.alone or order is None:
            return order
        return torch.tensor(self.of_first(order.tolist()), dtype=order.dtype, device=order.device)

    def facts(self, tokens: Tensor) -> dict[str, Any]:
        """For the report: how many processes, and every one's tokens and rows; nothing where there is one."""
        if self.alone:
            return {}
        shares = [self.share(tokens, number).numel() for number in range(self.size)]
        return {"size": self.size, "tokens": shares, "rows": list(self.rows)}

    def _cuts(self, height: int) -> list[slice]:
        ends = [height * number // self.size for number in range(self.size + 1)]
        return [slice(*pair) for pair in pairwise(ends)]

    def _pieces(self, problem: GroupProblem, pattern: SparsityPattern) -> list[tuple[int, slice, int]]:
        """Layer, rows and process of every piece; all processes come to the same."""
        pieces = []
        for layer, part in enumerate(problem.layers):
            height = len(part.weight)
            if isinstance(pattern, NM) or getattr(pattern, "scope", "layer") == "row":
                cuts = enumerate(self._cuts(height))
                pieces += [(layer, rows, owner) for owner, rows in cuts if rows.start < rows.stop]
            else:
                # A count over a whole layer cannot be cut; who has done least so far is next.
                pieces.append((layer, slice(0, height), self.rows.index(min(self.rows))))
            for at, rows, owner in pieces:
                if at == layer:
                    self.rows[owner] += rows.stop - rows.start
        return pieces

    def _from(self, owner: int, own: LayerSolution | None, like: Tensor, words: list[Any]) -> LayerSolution:
        """A process's solution, for all; `like` has its weights' form."""
        if owner == self.number and own is not None:
            weight, mask = own.weight.contiguous(), own.mask.to(torch.uint8).contiguous()
        else:
            weight, mask = (torch.empty_like(like, memory_format=torch.contiguous_format) for _ in range(2))
            mask = mask.to(torch.uint8)
        self._broadcast(weight, owner)
        self._broadcast(mask, owner)
        return LayerSolution(weight, mask.bool(), Status(words[0]), words[1])

    def _broadcast(self, tensor: Tensor, owner: int) -> None:
        with _together():
            distributed.broadcast(tensor, owner)

    def _exchange(self, words: Any) -> list[Any]:
        raw = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        with _together():
            distributed.all_gather(lengths, torch.tensor([len(raw)], device=self.device))
            longest = max(int(length) for length in lengths)
            found = [raw.new_zeros(longest) for _ in lengths]
            distributed.all_gather(found, torch.cat([raw, raw.new_zeros(longest - len(raw))]))
        texts = [bytes(text[: int(length)].tolist()) for text, length in zip(found, lengths, strict=True)]
        heard = [json.loads(text) for text in texts]
        if any(NO_ROOM in one for one in heard):
            raise NoRoomError
        return [one["words"] for one in heard]

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
            part = stats.gram.new_zeros(shapes[0]) if value is None else value.mul_(stats.tokens / max(tokens, 1))
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


def _words(solution: LayerSolution) -> list[Any]:
    """What is known of a solution besides its tensors."""
    return [solution.status.value, solution.stats]


def _head(stats: InputStats) -> dict[str, Any]:
    """What the others must know to add these statistics to theirs."""
    values = {name: getattr(stats, name) for name in FIELDS}
    shapes = {name: list(value.shape) for name, value in values.items() if value is not None}
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
        raise DesertedError("another process of this run has ended", "its own error says why") from error
