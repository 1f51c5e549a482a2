"""The scripts' own tests run with uncommitted changes, too."""

from __future__ import annotations

import pytest

from eval import record


@pytest.fixture(autouse=True)
def _clean_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tracked file differs from its commit."""
    monkeypatch.setattr(record, "changes", list)
