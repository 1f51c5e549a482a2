"""Hub reachability, probed in the background, so that an unreachable Hub costs no more than the imports."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from llmprune.errors import InputError

SECONDS, HUB_SECONDS = 3.5, 4.5
_HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "aiohttp"}
T = TypeVar("T")


class HubProbe:
    """A connection attempt to the Hub's host in a background thread; behind a proxy it counts as reachable at once."""

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
    """Start a new probe."""
    _probes.append(HubProbe())


def hub_reachable() -> bool:
    """Whether the last probe reached the Hub; starts one if there is none. False with `HF_HUB_OFFLINE`."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    if not _probes:
        start_probe()
    return _probes[-1].reachable()


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`; name look-ups have no time limit of their own.

    Raises:
        TimeoutError: it took longer than that many seconds.
    """
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


def check_token() -> None:
    """Refuse a token of the Hub that no request can carry.

    Raises:
        InputError: it has other than printable ASCII characters.
    """
    from huggingface_hub import get_token

    if (token := get_token()) and not re.fullmatch(r"[!-~]+", token):
        raise InputError(
            "the Hub token is not valid: it holds characters that no token has",
            "set HF_TOKEN to a token of https://huggingface.co/settings/tokens, or run `hf auth login` again",
        )


def is_unreachable(error: Exception) -> bool:
    """Whether an error means an unreachable host; those of HTTP libraries (no route, no DNS) are no OSErrors."""
    known = isinstance(error, OSError | TimeoutError | RuntimeError)
    return known or type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES
