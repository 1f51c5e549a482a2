"""A tiny model and a text that every test may read, made once; a Hub on the loopback."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes that share the cores slow each other down more than twofold if each has a thread on all of them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from hub_server import Hub

WORDS = 100


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of two blocks (widths 32 and 48, 128 positions) with a tokenizer and a card."""
    from helpers import save_tiny

    sizes = {"vocab_size": WORDS, "hidden_size": 32, "head_dim": 8, "intermediate_size": 48}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", folder, max_position_embeddings=128, initializer_range=0.2, **sizes)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\nbase_model: someone/tiny\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 4000 random words."""
    words = random.Random(0).choices(range(1, WORDS), k=4000)
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(" ".join(f"w{word}" for word in words), encoding="utf-8")
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that this process takes for the real one, with an empty cache."""
    import huggingface_hub
    from hub_server import TOKEN, Hub, environment
    from huggingface_hub import constants

    from llmprune.sources import network

    with Hub(TOKEN) as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
        monkeypatch.setattr(network, "_probes", [])
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        for name, value in environment(server, tmp_path).items():
            monkeypatch.setenv(name, value)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
