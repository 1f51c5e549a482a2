"""The code on the pages "Add your own" runs as it stands there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, random_tokens, save_tiny, token_file

from llmprune.pruning.criteria import CRITERIA
from llmprune.pruning.methods import METHODS
from llmprune.pruning.pattern import PATTERNS

PAGES = sorted(ROOT.glob("docs/extend/*.md"))
BLOCK = re.compile(r'^```python(?: title="([\w.]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with what the pages name: a model, and calibration tokens. Tables are put back afterwards."""
    save_tiny("llama", tmp_path / "my-model")
    token_file(tmp_path / "tokens.safetensors", random_tokens(8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before, patterns = [(table, dict(table)) for table in (METHODS, CRITERIA)], list(PATTERNS)
    yield tmp_path
    PATTERNS[:] = patterns
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, workdir: Path) -> None:
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    script = {"__name__": page.stem}
    for file, code in blocks:
        if file:
            (workdir / file).write_text(code, encoding="utf-8")
        else:
            exec(compile(code, page.name, "exec"), script)
