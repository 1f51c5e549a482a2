"""Reports of every schema are read as the current one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from llmprune import InputError, PruneReport
from llmprune.reporting.form import FORM, WORDS
from llmprune.reporting.report import FILE
from llmprune.reporting.schema import RENAMED_IN_2, SCHEMA, upgraded

FIRST = ROOT / "tests" / "data" / "report-schema-1.json"
"""What a run wrote that knew schema 1: channels and 2:4, block-wise reconstruction, self-calibration; layers left out,
two processes and a generated text put in."""


@pytest.fixture
def first() -> dict[str, Any]:
    """A report of schema 1."""
    value: dict[str, Any] = json.loads(FIRST.read_text(encoding="utf-8"))
    return value


def test_every_renamed_key_of_schema_1_is_found_under_its_new_name(first: dict[str, Any]) -> None:
    new = upgraded(first)
    assert new["schema"] == SCHEMA
    assert new["reconstructions"] == [
        {"block": old["block"], "before": old["before"], "after": old["after"], "skipped_steps": old["left_out"]}
        for old in first["refinements"]
    ]
    assert new["generations"] == first["samples"]
    assert new["sparsity"]["removed"] == first["sparsity"]["done"]
    assert new["calibration"]["self_generated"] == first["calibration"]["own"]
    assert new["calibration"]["samples"] == first["calibration"]["samples"]
    assert new["recipe"]["self_calibration"] == first["recipe"]["own"]
    assert new["recipe"]["reconstruct"] == first["recipe"]["refine"]
    assert new["recipe"]["compensate"] == first["recipe"]["reconstruct"]
    assert new["seconds"]["self_calibration"] == first["seconds"]["own_text"]
    assert new["recipe"]["reconstruct"] == first["recipe"]["refine"]
    assert new["recipe"]["compensate"] == first["recipe"]["reconstruct"]
    assert new["recipe"]["self_calibration"] == first["recipe"]["own"]
    assert new["processes"]["world_size"] == first["processes"]["size"]
    assert new["size"] == first["size"]
    for before, after in zip(first["layers"], new["layers"], strict=True):
        names = RENAMED_IN_2["layers[].stats"]
        assert after["stats"] == {names.get(key, key): value for key, value in before["stats"].items()}
        assert after["unpruned_zeros"] == before["kept_zeros"]


def test_the_page_names_every_key_that_was_renamed() -> None:
    text = (ROOT / "docs" / "reference" / "report.md").read_text(encoding="utf-8")
    rows = [line.split(" -> ") for line in text.splitlines() if " -> " in line]
    assert [[old.rpartition(".")[2], new.rpartition(".")[2]] for old, new in rows] == [
        [old, new] for names in RENAMED_IN_2.values() for old, new in names.items()
    ]


def test_no_value_is_lost_by_an_upgrade(first: dict[str, Any]) -> None:
    def leaves(value: Any) -> list[str]:
        items = value.values() if isinstance(value, dict) else value
        return [leaf for item in items for leaf in leaves(item)] if isinstance(value, dict | list) else [repr(value)]

    assert leaves(upgraded(first)) == [str(SCHEMA), *leaves(first)]


def test_an_upgrade_changes_nothing_the_second_time(first: dict[str, Any]) -> None:
    assert upgraded(upgraded(first)) == upgraded(first)


def test_a_report_of_schema_1_is_read_and_written_as_the_current_one(first: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(FIRST.read_text(encoding="utf-8"), encoding="utf-8")
    wanted = upgraded(first)
    blocks = [{**block, "expert_tokens": []} for block in wanted["blocks"]]
    layers = [{**layer, "grid": ""} for layer in wanted["layers"]]
    assert PruneReport.read(tmp_path).to_json() == {
        **wanted,
        "fingerprint": {},
        "files": [],
        "blocks": blocks,
        "layers": layers,
        "quantization": {},
        "distillation": {},
        "mixtures": [],
    }


@pytest.mark.parametrize("schema", [SCHEMA + 1, "3", None])
def test_a_schema_that_is_not_known_is_refused(first: dict[str, Any], tmp_path: Path, schema: object) -> None:
    (tmp_path / FILE).write_text(json.dumps(upgraded(first) | {"schema": schema}), encoding="utf-8")
    with pytest.raises(InputError, match=f"schema {schema}.*up to {SCHEMA}") as refused:
        PruneReport.read(tmp_path)
    assert str(tmp_path) in refused.value.message
    assert "update" in refused.value.hint


def form_of(path: str) -> Any:
    """What the form of a report says of a documented key."""
    form: Any = FORM
    for step in path.replace("[]", "").split("."):
        while isinstance(form, tuple | list):
            form = form[0]
        if not isinstance(form, Mapping):
            break
        form = next((form[key] for key in (step, f"{step}?", "*") if key in form), None)
    return form[0] if isinstance(form, tuple) else form


def test_every_number_of_a_report_is_checked_to_be_one() -> None:
    """What is put into words is formatted as a number, which fails for anything else."""
    page = (ROOT / "docs" / "reference" / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.*\[\]]+)` \| (?:integer|number)\b", page, re.MULTILINE)
    assert len(rows) > 50
    numbers = {"a whole number", "a number", "a finite number"}
    loose = {path for path in rows if WORDS.get(form_of(path)) not in numbers}
    # Read with checks of their own, or shown as they are.
    elsewhere = ("schema", "method.", "recipe.", "machine.", "processes.", "distillation.evaluation.")
    assert {path for path in loose if not path.startswith(elsewhere)} == set()
