"""Progress bars of a run in a notebook, or in any program with tqdm."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from llmprune.errors import printable
from llmprune.progress import Progress


class ProgressBars(Progress):
    """A tqdm bar for every stage, a widget where the notebook can draw one; notes and warnings stand between the bars.

    Use it as `prune(job, ProgressBars())`.

    Args:
        options: given to every bar, such as `file=sys.stdout` or `leave=False`; see `tqdm.tqdm`.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._bar: tqdm[Any] | None = None

    def note(self, text: str) -> None:
        tqdm.write(printable(text), file=self._options.get("file"))

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    def start(self, label: str, total: float, unit: str = "") -> None:
        self._bar = tqdm(total=total, desc=label, unit=unit or "step", unit_scale=bool(unit), **self._options)

    def step(self, amount: float = 1, text: str = "") -> None:
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(printable(text), refresh=False)
            self._bar.update(amount)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
