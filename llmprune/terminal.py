"""How a run looks in a terminal: one line of progress, and a short table at the end."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from llmprune.progress import Progress

if TYPE_CHECKING:
    from tqdm import tqdm

    from llmprune.report import PruneReport

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
            self._bar = tqdm(
                total=total, desc=f"{label:<18}", leave=False, file=sys.stderr, unit=unit or "it", unit_scale=bool(unit),
                bar_format="{desc} {bar:24} " + count + "{postfix}  {remaining} left",
            )  # fmt: skip

    def step(self, amount: float = 1, text: str = "") -> None:
        self._done += amount
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
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
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


def duration(seconds: float) -> str:
    """`75.2` -> `1 min 15 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def summary(report: PruneReport) -> str:
    """What the user reads at the end."""
    lines = ["", *_table(_result_rows(report))]
    lines += [f"warning: {text}" for text in report.warnings]
    lines.append(report.sparsity["note"])
    return "\n".join(lines) + "\n"


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return [f"{key:<12} {value}" for key, value in rows] + [""]


def _result_rows(report: PruneReport) -> list[tuple[str, str]]:
    layers = len(report.layers)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    pruned = sum(layer.pruned for layer in report.layers)
    seconds = report.seconds
    rows = []
    if report.evaluation is not None:
        dense, after = report.evaluation["dense"], report.evaluation["pruned"]
        rows.append(
            (
                "perplexity",
                f"dense {dense['value']:.2f} ± {dense['error']:.2f}, pruned {after['value']:.2f} ± {after['error']:.2f} "
                f"on {report.evaluation['source']} ({after['windows']} windows of {after['context']} tokens)",
            )
        )
    rows += [
        (
            "sparsity",
            f"{report.sparsity['meaning']}; {pruned / weights:.2%} of {weights / 1e6:.1f} M weights in {layers} layers",
        ),
        ("coverage", coverage_text(report.coverage)),
        ("method", f"{report.method['name']}, mean relative layer error {report.mean_error:.4f}"),
        ("calibration", calibration_text(report.calibration)),
        ("size", f"{size(report.size['dense'])} dense, {size(report.size['pruned'])} pruned"),
        (
            "time",
            f"{duration(seconds['total'])} in all; pruning {duration(seconds['prune'])}, of which "
            f"{duration(seconds['solve'])} in {layers} layer solves",
        ),
        ("memory", f"peak {size(report.peak_memory)}"),
        ("saved to", report.out),
        ("load with", f'AutoModelForCausalLM.from_pretrained("{report.out}")'),
    ]
    raised = sum(layer.status != "ok" for layer in report.layers)
    if raised:
        rows.insert(4, ("status", f"{raised} layers needed special care; see prune_report.json"))
    return rows


def coverage_text(coverage: dict[str, Any]) -> str:
    """How much of the blocks is pruned, and what is not."""
    text = (
        f"pruned layers hold {coverage['fraction']:.1%} of {coverage['block_parameters'] / 1e6:.1f} M block parameters"
    )
    skipped = [
        f"{reason} {weights / coverage['block_parameters']:.1%}" for reason, weights in coverage["skipped"].items()
    ]
    return text + (f"; left dense: {', '.join(skipped)}" if skipped else "")


def calibration_text(calibration: dict[str, Any]) -> str:
    """Which tokens were used."""
    seed = f", seed {calibration['seed']}" if calibration["seed"] is not None else ""
    return f"{calibration['samples']} x {calibration['seq_len']} tokens of {calibration['source']}{seed}"


def plan_text(facts: dict[str, Any]) -> str:
    """What `--dry-run` shows."""
    rows = [
        ("model", f"{facts['model']['name']}: {facts['model']['class']}, {facts['model']['parameters'] / 1e6:.1f} M parameters, {facts['model']['blocks']} blocks"),
        ("sparsity", facts["sparsity"]["meaning"]),
        ("method", facts["method"]["name"]),
        ("coverage", coverage_text(facts["coverage"])),
        ("calibration", calibration_text(facts["calibration"])),
        ("estimate", f"{duration(facts['estimate']['seconds'])}, {size(facts['estimate']['memory'])} of memory above the libraries' own"),
        ("size", f"{size(facts['size']['pruned'])} (dense {size(facts['size']['dense'])})"),
        ("would save", facts["out"]),
    ]  # fmt: skip
    return "\n".join(["", *_table(rows), "dry run: nothing was written\n"])
