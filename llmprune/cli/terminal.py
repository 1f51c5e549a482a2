"""Progress and summaries in a terminal: one line of progress, a short table at the end."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from llmprune.cli.shell import say
from llmprune.errors import printable
from llmprune.progress import Progress
from llmprune.reporting.report import PruneReport
from llmprune.reporting.words import (
    calibration_text,
    coverage_text,
    distillation_rows,
    duration,
    error_name,
    error_text,
    evaluation_text,
    grid_text,
    loader_of,
    parameters_text,
    perplexity_text,
    pruned_text,
    quantization_text,
    recipe_text,
    removes_only,
    size,
    super_experts_text,
)

if TYPE_CHECKING:
    from tqdm import tqdm

PLAIN_SECONDS = 5.0


class TerminalProgress(Progress):
    """A bar where stderr is a terminal, a plain line now and then where it is not.

    Args:
        quiet: show warnings only.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.fancy = sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._label, self._unit, self._total, self._done = "", "", 0.0, 0.0
        self._started = self._said = 0.0

    def note(self, text: str) -> None:
        if not self.quiet:
            self._write(text)

    def warn(self, text: str) -> None:
        self._write(f"warning: {text}")

    def start(self, label: str, total: float, unit: str = "") -> None:
        self._label, self._unit, self._total, self._done = label, unit, total, 0
        self._started = self._said = time.monotonic()
        if self.fancy and not self.quiet:
            from tqdm import tqdm

            count = "{n_fmt}/{total_fmt}" + ("B" if unit else "")
            layout = "{desc} {bar:24} " + count + "{postfix}  {remaining} left"
            self._bar = tqdm(
                total=total,
                desc=f"{label:<18}",
                leave=False,
                file=sys.stderr,
                unit=unit or "it",
                unit_scale=bool(unit),
                bar_format=layout,
                ncols=min(shutil.get_terminal_size().columns, 100),
            )

    def step(self, amount: float = 1, text: str = "") -> None:
        self._done += amount
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(printable(text), refresh=False)
            self._bar.update(amount)
        elif not self.quiet and (text or time.monotonic() - self._said > PLAIN_SECONDS):
            self._said = time.monotonic()
            self._write(self._plain(text))

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif not self.quiet:
            self._write(f"{self._label}: done in {duration(time.monotonic() - self._started)}")

    def _plain(self, text: str) -> str:
        scale = 2**20 if self._unit else 1
        left = (time.monotonic() - self._started) * (self._total / max(self._done, 1e-9) - 1)
        count = f"{self._done / scale:.0f}/{self._total / scale:.0f}{' MiB' if self._unit else ''}"
        return f"{self._label} {count}  {text + '  ' if text else ''}{duration(left)} left"

    def _write(self, text: str) -> None:
        text = printable(text)
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            say(text, sys.stderr)


def summary(report: PruneReport) -> str:
    """The table at the end of a run."""
    return "\n".join(["", *_table(_result_rows(report)), printable(report.sparsity["note"])])


def distilled_text(report: PruneReport) -> str:
    """The table at the end of a distillation."""
    rows = [*distillation_rows(report.distillation), ("saved to", report.out)]
    rows += [("load with", f'{loader_of(report.model)}.from_pretrained("{report.out}")')]
    return "\n".join(["", *_table(rows)])


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return [f"{key:<12} {printable(value)}" for key, value in rows] + [""]


def _result_rows(report: PruneReport) -> list[tuple[str, str]]:
    layers, seconds = report.layers, report.seconds
    solves = f", {duration(seconds['solve'])} of it in {len(layers)} layer solves" if layers else ""
    raised = sum(layer.status != "ok" for layer in layers)
    rows = _perplexity_rows(report.evaluation) if report.evaluation is not None else []
    rows += [
        ("sparsity", report.sparsity["meaning"]),
        *_removed_rows(report.sparsity, report.model),
        *([] if removes_only(report.sparsity) else [("reached", pruned_text(report)), _coverage_row(report.coverage)]),
        *_grid_rows(report.quantization),
        ("method", recipe_text(report.recipe) + _error(report)),
        *_super_rows(report),
        *([("status", f"{raised} layers needed special care, see prune_report.json")] if raised else []),
        ("calibration", calibration_text(report.calibration)),
        *_source_rows(report.model),
        ("size", f"{size(report.size['dense'])} dense, {size(report.size['pruned'])} pruned"),
        ("time", f"{duration(seconds['total'])}; pruning {duration(seconds['prune'])}{solves}{_shared(report)}"),
        ("memory", f"peak {size(report.peak_memory)}"),
        ("saved to", report.out),
        ("load with", f'{loader_of(report.model)}.from_pretrained("{report.out}")'),
    ]
    return rows


def _error(report: PruneReport) -> str:
    return f", {name} {error_text(report)}" if (name := error_name(report)) else ""


def _super_rows(report: PruneReport) -> list[tuple[str, str]]:
    text = super_experts_text(report.mixtures, report.recipe.get("guard", True))
    return [("guard", text)] if text else []


def _grid_rows(quantization: dict[str, Any]) -> list[tuple[str, str]]:
    return [("quantised", text)] if (text := grid_text(quantization)) else []


def _source_rows(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [("source", text)] if (text := quantization_text(model)) else []


def _removed_rows(sparsity: dict[str, Any], model: dict[str, Any]) -> list[tuple[str, str]]:
    removed = [("gives", text) for text in sparsity["removed"]]
    return [*removed, ("parameters", parameters_text(model))] if removed else []


def _coverage_row(coverage: dict[str, Any]) -> tuple[str, str]:
    return "coverage", coverage_text(coverage)


def _shared(report: PruneReport) -> str:
    return f"; shared by {report.processes['world_size']} processes" if report.processes else ""


def _perplexity_rows(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    dense, pruned = (perplexity_text(evaluation[key]) for key in ("dense", "pruned"))
    return [("perplexity", f"dense {dense}, pruned {pruned}"), ("measured on", evaluation_text(evaluation))]


def _expert_rows(apart: int, blocks: int) -> list[tuple[str, str]]:
    """What is said where the experts of a block exceed the memory for them."""
    if not apart:
        return []
    return [
        ("experts", f"of {apart} of {blocks} blocks, read group by group: together they exceed the memory for them")
    ]


def plan_text(facts: dict[str, Any]) -> str:
    """The table of `--dry-run`."""
    model, cost = facts["model"], facts["estimate"]
    rows = [
        ("model", f"{model['name']}: {model['class']}, {model['parameters'] / 1e6:.1f} M parameters"),
        *_source_rows(model),
        ("blocks", f"{model['blocks']}, with {len(facts['layers'])} layers to prune"),
        ("sparsity", facts["sparsity"]["meaning"]),
        *_removed_rows(facts["sparsity"], model),
        *_grid_rows(facts["quantization"]),
        ("method", recipe_text(facts["recipe"])),
        *([] if removes_only(facts["sparsity"]) else [_coverage_row(facts["coverage"])]),
        ("calibration", calibration_text(facts["calibration"])),
        ("estimate", f"about {duration(cost['seconds'])}, {size(cost['memory'])} of memory above the libraries' own"),
        *_expert_rows(cost["blocks_by_expert"], model["blocks"]),
        ("efforts", ", ".join(f"{name} {duration(seconds)}" for name, seconds in facts["efforts"].items())),
        ("size", f"{size(facts['size']['pruned'])} (dense {size(facts['size']['dense'])})"),
        ("would save", facts["out"]),
    ]
    return "\n".join(["", *_table(rows), "dry run: nothing was written"])
