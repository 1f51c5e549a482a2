"""Collectives over the processes of a run: objects as JSON, tensors, rows of a matrix.

Every exchange begins with an all-gather of short JSON; tensors follow, whose shapes are then known. A process whose
device is out of memory sends that in place of its object, so that all of them start the attempt again together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from llmprune.errors import PruneError

T = TypeVar("T")
OUT_OF_MEMORY = "out of memory"


class RemoteOOMError(Exception):
    """Another process's device is out of memory."""


class PeerFailedError(PruneError):
    """Another process has ended; only rank 0 prints it, as the process that ended may not have printed anything."""


class ProcessGroup:
    """The processes of a run; with one process every collective returns its argument.

    Args:
        rank: of this process, from 0.
        world_size: number of processes.
        device: of the tensors that are exchanged.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, device: str = "cpu") -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)

    @property
    def is_single(self) -> bool:
        """Whether this is the only process."""
        return self.world_size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reads, writes and reports for all."""
        return self.rank == 0

    # Objects

    def all_gather_object(self, value: T) -> list[T]:
        """The JSON values of all processes, by rank; waits for all.

        Raises:
            RemoteOOMError: a process has no memory left on its device.
        """
        return [value] if self.is_single else self._all_gather({"value": value})

    def broadcast_object(self, value: T) -> T:
        """The JSON value of rank 0."""
        return self.all_gather_object(value if self.is_main else None)[0]  # type: ignore[return-value]

    def signal_oom(self) -> None:
        """Send, in place of the object that the others wait for, that this process's device is out of memory."""
        if not self.is_single:
            try:
                self._all_gather({OUT_OF_MEMORY: True})
            except RemoteOOMError:
                pass

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.all_gather_object(None)

    def final_barrier(self) -> None:
        """Wait until all processes are done."""
        if not self.is_single:
            with self._peers_alive():
                # Unlike an exchange, it leaves no tensor to a thread that may outlive the interpreter.
                distributed.barrier()

    def main_process_first(self, work: Callable[[], T]) -> T:
        """The result of `work`, called in rank 0 before the others, which then find in the cache what it fetched."""
        if not self.is_main:
            self.barrier()
        result = work()
        if self.is_main:
            self.barrier()
        return result

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums of numbers over the processes, bit for bit the same in all."""
        return [sum(column) for column in zip(*self.all_gather_object(list(values)), strict=True)]

    # Tensors

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over the processes, in place."""
        if self.is_single:
            return
        self.barrier()
        for tensor in tensors:
            self.all_reduce_now(tensor)

    def all_reduce_now(self, tensor: Tensor) -> None:
        """Sum a tensor over the processes, in place; right behind an exchange: all of them are known to be here."""
        with self._peers_alive():
            distributed.all_reduce(tensor)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Make tensors those of rank 0, in place."""
        if self.is_single:
            return
        self.barrier()
        for tensor in tensors:
            self.broadcast_now(tensor, 0)

    def broadcast_now(self, tensor: Tensor, source: int) -> None:
        """Make a tensor that of one process, in place; right behind an exchange."""
        with self._peers_alive():
            distributed.broadcast(tensor, source)

    # Rows

    def row_ranges(self, height: int) -> list[slice]:
        """The rows of a matrix of this height that each process computes, by rank."""
        ends = [height * rank // self.world_size for rank in range(self.world_size + 1)]
        return [slice(*pair) for pair in pairwise(ends)]

    def own_rows(self, height: int) -> slice:
        """The rows of a matrix of this height that this process computes."""
        return self.row_ranges(height)[self.rank]

    def map_rows(self, compute: Callable[[slice], Tensor], height: int) -> Tensor:
        """A matrix computed row by row, every process its own rows, gathered in all.

        Args:
            compute: the result for some of the rows.
            height: number of rows.
        """
        if self.is_single:
            return compute(slice(0, height))
        ranges = self.row_ranges(height)
        mine = compute(ranges[self.rank]).contiguous()
        self.barrier()
        found = [
            mine if owner == self.rank else mine.new_empty(rows.stop - rows.start, *mine.shape[1:])
            for owner, rows in enumerate(ranges)
        ]
        for owner, part in enumerate(found):
            self.broadcast_now(part, owner)
        return torch.cat(found)

    def _all_gather(self, message: dict[str, Any]) -> list[Any]:
        raw = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        with self._peers_alive():
            distributed.all_gather(lengths, torch.tensor([len(raw)], device=self.device))
            longest = max(int(length) for length in lengths)
            found = [raw.new_zeros(longest) for _ in lengths]
            distributed.all_gather(found, torch.cat([raw, raw.new_zeros(longest - len(raw))]))
        texts = [bytes(text[: int(length)].tolist()) for text, length in zip(found, lengths, strict=True)]
        messages = [json.loads(text) for text in texts]
        if any(OUT_OF_MEMORY in one for one in messages):
            raise RemoteOOMError
        return [one["value"] for one in messages]

    @contextmanager
    def _peers_alive(self) -> Iterator[None]:
        """Turn a collective's failure into the error that another process has ended."""
        try:
            yield
        except RuntimeError as error:
            failed = PeerFailedError("another process of this run has ended", "its own error says why, if it had one")
            failed.silent = not self.is_main
            raise failed from error


SINGLE = ProcessGroup()
"""The group of a run in one process."""
