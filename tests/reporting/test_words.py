"""A fact of a report reads the same wherever it is shown."""

from __future__ import annotations

import html
import json

import pytest
from helpers import ROOT

from llmprune import PruneReport
from llmprune.cli.terminal import summary
from llmprune.reporting.html_report import report_page
from llmprune.reporting.model_card import model_card
from llmprune.reporting.words import (
    calibration_text,
    coverage_text,
    duration,
    error_text,
    evaluation_text,
    perplexity_text,
    pruned_text,
    recipe_text,
    size,
)


@pytest.fixture(scope="module")
def report() -> PruneReport:
    """A report with removed channels, 2:4, block-wise reconstruction and self-calibration."""
    value = json.loads((ROOT / "tests" / "data" / "report-schema-1.json").read_text(encoding="utf-8"))
    return PruneReport.from_json(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (75.2, "1 min 15 s"),
        (3599.6, "1 h 00 min"),
        (7260, "2 h 01 min"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_are_binary() -> None:
    assert (size(2**20), size(3 * 2**29)) == ("1 MiB", "1.50 GiB")


def test_facts_read_the_same_in_terminal_page_card_and_notebook(report: PruneReport) -> None:
    assert report.evaluation
    terminal, page = summary(report), html.unescape(report_page(report))
    card, notebook = model_card(report, ROOT / "tests"), html.unescape(report._repr_html_())
    shown = {
        perplexity_text(report.evaluation["pruned"]): (terminal, page, card, notebook),
        evaluation_text(report.evaluation): (terminal, page, card),
        calibration_text(report.calibration): (terminal, page, card),
        recipe_text(report.recipe): (terminal, page, card, notebook),
        coverage_text(report.coverage): (terminal, page),
        error_text(report): (terminal, notebook),
        report.sparsity["removed"][0]: (terminal, page, card, notebook),
    }
    for text, places in shown.items():
        assert all(text in place for place in places), text
    assert pruned_text(report) in terminal


def test_errors_before_and_after_compensation_are_means_over_the_layers_that_lost_inputs(report: PruneReport) -> None:
    (down,) = [layer for layer in report.layers if layer.name.endswith("down_proj")]
    assert error_text(report) == (
        f"{report.mean_error:.4f}; of layers with removed inputs {down.stats['error_uncompensated']:.4f} before "
        f"compensation, {down.stats['error_compensated']:.4f} after, {down.error:.4f} with the weights pruned"
    )


def test_how_windows_begin_is_said_where_it_is_known(report: PruneReport) -> None:
    given, measured = report.calibration, report.evaluation
    assert "BOS" not in calibration_text(given) + evaluation_text(measured)
    for count, says in ((0, ", begun without BOS"), (1, ", begun with BOS"), (2, ", begun with BOS")):
        assert calibration_text(given | {"bos_tokens": count}) == calibration_text(given) + says
        assert evaluation_text(measured | {"bos_tokens": count}) == evaluation_text(measured) + says


def test_the_part_of_a_long_text_that_was_drawn_from_is_said(report: PruneReport) -> None:
    source = report.calibration["source"]
    text = calibration_text(report.calibration | {"characters": 4_200_000})
    assert f" tokens of {source}, from its first 4,200,000 characters, seed " in text
    assert calibration_text(report.calibration | {"characters": None}) == calibration_text(report.calibration)


def test_self_generated_windows_are_counted(report: PruneReport) -> None:
    given = report.calibration
    assert calibration_text(given).endswith(
        f"seed {given['seed']}, and {given['self_generated']} self-generated windows"
    )
    assert calibration_text(given | {"self_generated": 1}).endswith("1 self-generated window")
    assert "self-generated" not in calibration_text(given | {"self_generated": 0})
