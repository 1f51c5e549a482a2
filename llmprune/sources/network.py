"""Is the Hugging Face Hub there? Asked in the background, so that an unreachable one costs no more than the imports."""

from __future__ import annotations

import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

SECONDS, HUB_SECONDS = 3.5, 4.5
_HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "aiohttp"}
T = TypeVar("T")


class HubProbe:
    """A connection attempt to the Hub's host in a thread of its own; behind a proxy it says yes at once."""

    def __init__(self) -> None:
        self._answer: bool | None = None
        self._deadline = time.monotonic() + SECONDS
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        if urllib.request.getproxies().keys() - {"no"}:
            self._answer = True
            return
        try:
            port = url.port or (80 if url.scheme == "http" else 443)
            socket.create_connection((url.hostname or "", port), SECONDS).close()
            self._answer = True
        except OSError:
            self._answer = False

    def reachable(self) -> bool:
        """Whether the Hub took a connection within `SECONDS` of the start."""
        self._thread.join(max(self._deadline - time.monotonic(), 0))
        return bool(self._answer)


_probes: list[HubProbe] = []


def start_probe() -> None:
    """Begin to ask."""
    _probes.append(HubProbe())


def hub_reachable() -> bool:
    """The answer of the last probe; begins one if there was none. `HF_HUB_OFFLINE` says no."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    if not _probes:
        start_probe()
    return _probes[-1].reachable()


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, or TimeoutError after some seconds: name look-ups cannot be given a time limit."""
    box: list[Any] = []

    def target() -> None:
        try:
            box.append((True, work()))
        except BaseException as error:
            box.append((False, error))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise TimeoutError(f"no answer within {seconds} s")
    succeeded, value = box[0]
    if not succeeded:
        raise value
    result: T = value
    return result


def is_unreachable(error: Exception) -> bool:
    """Whether an error means that there was no answer; the HTTP libraries' own (no route, no DNS) are no OSErrors."""
    known = isinstance(error, OSError | TimeoutError | RuntimeError)
    return known or type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES
