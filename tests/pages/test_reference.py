"""The reference pages are what the code says."""

from __future__ import annotations

import sys
from importlib import util
from types import ModuleType

import pytest
from helpers import ROOT

from llmprune.cli.flags import build_parser
from llmprune.job import Job, knobs


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """`docs/reference.py`, which is no part of a package."""
    spec = util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli.md", "job.md"])
def test_a_reference_page_is_made_from_the_code(page: str, reference: ModuleType) -> None:
    made = reference.PAGES[page]()
    assert (reference.FOLDER / page).read_text(encoding="utf-8") == made, "run: python docs/reference.py"


def test_every_flag_and_field_has_a_row(reference: ModuleType) -> None:
    cli, job = reference.cli(), reference.job()
    for action in build_parser()._actions:
        assert any(flag in cli or flag.replace("--", "--[no-]") in cli for flag in action.option_strings)
    assert all(f"\n| `{each.name}` | " in job for each in knobs(Job))
