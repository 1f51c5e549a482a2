"""Pausable forwards: they stop where a group of layers is about to run, and resume when the group has been solved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from greenlet import getcurrent, greenlet

from llmprune.model.routed_call import RoutedCall
from llmprune.streaming.batch import Batch, StopForward
from llmprune.streaming.hooks import Observation, Observer


class StopAtGroup(Observer):
    """Ends a forward where it reaches a group."""

    def __init__(self, number: int, outputs: bool = False) -> None:
        super().__init__(outputs)
        self.number = number
        self.observation: Observation | None = None

    def arrive(self, number: int, observation: Observation) -> None:
        if number == self.number:
            self.observation = observation
            raise StopForward


class StopAtExperts(Observer):
    """Ends a forward where a module is about to run its experts."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner

    def enter(self, owner: str, call: RoutedCall) -> None:
        super().enter(owner, call)
        if owner == self.owner:
            raise StopForward

    def arrive(self, number: int, observation: Observation) -> None:
        """Pass by a group."""


class PausableForward(Observer):
    """One batch's forward through a block, in a greenlet that pauses where a group begins, or behind its residual add.

    Args:
        batch: the activations that enter the block.
        run: lets them pass through it.
        observed: within, the block's observer is the one given.
        outputs: whether the outputs of layers that add to the residual stream are wanted.
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
        self.observation = NOTHING
        self._next = 0
        self._hub = getcurrent()
        self._run = greenlet(run, self._hub)
        self._observed = observed

    def __enter__(self) -> PausableForward:
        self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        # Its frames refer to itself in ways that the garbage collector cannot see.
        self._run.throw()

    def resume(self) -> None:
        """Run to the next pause, or to the end of the block."""
        self.at, self.observation = None, NOTHING
        with self._observed(self):
            self._run.switch()

    def leave(self, number: int) -> None:
        """Do not pause at this group any more; resume if this forward is paused there."""
        self._next = number + 1
        if self.at == number:
            self.resume()

    def arrive(self, number: int, observation: Observation) -> None:
        if number < self._next:
            return
        self.at, self.observation = number, observation
        # A forward that pauses inside autocast must not leave it on for the others.
        with torch.autocast(observation.inputs.device.type, enabled=False):
            self._hub.switch()


NOTHING = Observation(torch.empty(0))
