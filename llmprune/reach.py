"""Is the Hugging Face Hub there? Asked in the background, so that an unreachable one costs no more than the imports."""

from __future__ import annotations

import os
import socket
import threading
import time
import urllib.request
from urllib.parse import urlsplit

SECONDS = 3.5


class HubProbe:
    """A connection attempt to the Hub's host in a thread of its own; behind a proxy it says yes at once."""

    def __init__(self) -> None:
        self._answer: bool | None = None
        self._deadline = time.monotonic() + SECONDS
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        if urllib.request.getproxies():
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
