"""Progress of a run: the command line draws it, a notebook or a test may ignore it.

Texts may hold names from files: who draws them shows them through `errors.printable`.
"""

from __future__ import annotations


class Progress:
    """Silent base class: override what you want to see."""

    def note(self, text: str) -> None:
        """A sentence worth knowing."""

    def warn(self, text: str) -> None:
        """A sentence the user must not miss."""

    def start(self, label: str, total: float, unit: str = "") -> None:
        """A stage of `total` steps begins; `unit` is `"B"` where the steps are bytes."""

    def step(self, amount: float = 1, text: str = "") -> None:
        """Advance the stage by `amount`; `text` is its newest figure."""

    def finish(self) -> None:
        """The stage is over."""
