"""Forwards that stop where a group of layers is about to run: for good, or to go on when the group has been solved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from greenlet import getcurrent, greenlet

from llmprune.streaming.capture import Batch, Stop
from llmprune.streaming.hooks import Observer, Seen


class Finder(Observer):
    """Ends a forward where it comes to a group."""

    def __init__(self, number: int, outputs: bool = False) -> None:
        super().__init__(outputs)
        self.number = number
        self.seen: Seen | None = None

    def arrive(self, number: int, seen: Seen) -> None:
        if number == self.number:
            self.seen = seen
            raise Stop


class Forward(Observer):
    """One batch's forward through a block, in a greenlet that pauses where a group begins, or where its output lands.

    Args:
        batch: the activations that enter the block.
        run: lets them pass through it.
        observed: within, the block's observer is the one given.
        outputs: whether outputs of layers that land are wanted.
    """

    def __init__(
        self,
        batch: Batch,
        run: Callable[[], None],
        observed: Callable[[Observer], AbstractContextManager[None]],
        outputs: bool = False,
    ) -> None:
        super().__init__(outputs)
        self.batch = batch
        self.at: int | None = None
        self.seen = NOTHING
        self._next = 0
        self._hub = getcurrent()
        self._run = greenlet(run, self._hub)
        self._observed = observed

    def __enter__(self) -> Forward:
        self.go_on()
        return self

    def __exit__(self, *_: object) -> None:
        # Its frames refer to itself in ways that the garbage collector cannot see.
        self._run.throw()

    def go_on(self) -> None:
        """Run to the next pause, or to the end of the block."""
        self.at, self.seen = None, NOTHING
        with self._observed(self):
            self._run.switch()

    def leave(self, number: int) -> None:
        """Do not pause at this group any more; go on if that is where this forward stands."""
        self._next = number + 1
        if self.at == number:
            self.go_on()

    def arrive(self, number: int, seen: Seen) -> None:
        if number < self._next:
            return
        self.at, self.seen = number, seen
        # A forward that pauses inside autocast must not leave it on for the others.
        with torch.autocast(seen.inputs.device.type, enabled=False):
            self._hub.switch()


NOTHING = Seen(torch.empty(0))
