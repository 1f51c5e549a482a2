"""Wall time by stage."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Adds up wall time by stage, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._since: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._since[stage] = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - self._since.pop(stage)

    def so_far(self) -> dict[str, float]:
        """Of all stages, also those that are not over."""
        now = time.perf_counter()
        return {**self.seconds, **{key: self.seconds[key] + now - since for key, since in self._since.items()}}

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what was spent before."""
        for stage, spent in seconds.items():
            self.seconds[stage] += spent
