"""A tiny model and a text that every test may read, made once."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes that share the cores slow each other down more than twofold if each has a thread on all of them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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
