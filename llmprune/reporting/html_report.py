"""`prune_report.html`: the report of a run as one self-contained page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmprune.reporting import charts as chart
from llmprune.reporting.report import FILE, LayerReport, PruneReport, split_name
from llmprune.reporting.words import (
    calibration_text,
    coverage_text,
    distillation_rows,
    duration,
    escape,
    evaluation_text,
    grid_text,
    parameters_text,
    perplexity_text,
    pruned_text,
    quantization_text,
    recipe_text,
    removes_only,
    size,
)
from llmprune.runtime.files import replacing, write_json, write_text

PAGE = "prune_report.html"
STATS = {
    "damping_lambda": "damping λ",
    "damping_retries": "damping retries",
    "choice_retries": "choice retries",
    "compensation_retries": "compensation retries",
    "target_retries": "target retries",
    "order_retries": "order retries",
    "participation_ratio": "participation ratio",
    "condition": "condition",
    "target_strength": "target strength",
    "error_uncompensated": "uncompensated",
    "error_compensated": "compensated",
}
"""Statistics of a layer -> heads of columns."""
STAGES = {
    "prepare": "checks, download, tokens",
    "dense_evaluation": "dense perplexity",
    "self_calibration": "self-calibration",
    "prune": "pruning, of it:",
    "allocate": "· allocation",
    "experts": "· removing experts",
    "solve": "· solving layers",
    "error": "· measuring layer errors",
    "reconstruct": "· block-wise reconstruction",
    "write": "· writing",
    "verify": "verifying",
    "pruned_evaluation": "pruned perplexity",
    "total": "in all",
}
"""Stages of a run -> names, in order; the rest of pruning is forward passes."""
STYLE = """
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 960px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.note, .facts dt { color: var(--soft); font-size: .87rem; } .note { max-width: 46rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: .6rem; margin: 1.2rem 0; }
.facts div { background: var(--panel); border-radius: 8px; padding: .6rem .8rem; } dl, dd { margin: 0; }
dd { font-size: 1.2rem; } dd small { font-size: .8rem; color: var(--soft); display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; } pre { background: var(--panel); border-radius: 8px; padding: .7rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; } summary { cursor: pointer; }
.warning { border-left: 4px solid var(--warn); padding: .2rem .8rem; margin: .6rem 0; }
"""


EXPERT = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of an expert in a layer's name."""


def write_report(report: PruneReport, folder: Path) -> None:
    """Write `prune_report.json` and `prune_report.html` into a folder, each atomically.

    They name the folder, but not where it lies.
    """
    write_json(folder / FILE, {**report.to_json(), "out": Path(report.out).name})
    with replacing(folder / PAGE) as temporary:
        write_text(temporary, report_page(report))


def report_page(report: PruneReport) -> str:
    """The page of a run."""
    model = Path(report.model["name"]).name
    return page(
        f"{model}, {report.sparsity['pattern']}",
        [
            f"<h1>{escape(model)}, {escape(report.sparsity['pattern'])}</h1>",
            f'<p class="note">{escape(report.sparsity["meaning"])}; method {escape(report.method["name"])}</p>',
            *(f'<p class="note">{escape(text)}</p>' for text in [*report.sparsity["removed"], *grid_notes(report)]),
            *(f'<p class="warning">{escape(text)}</p>' for text in report.warnings),
            facts(report),
            *_distillation(report),
            *_errors(report),
            *_inputs(report),
            *_mixtures(report),
            *_reconstructions(report),
            *_blocks(report),
            *_generations(report),
            *_provenance(report),
        ],
    )


def grid_notes(report: PruneReport) -> list[str]:
    """How the written weights are quantised, if they are."""
    return [f"quantised: {text}"] if (text := grid_text(report.quantization)) else []


def page(title: str, parts: Iterable[str]) -> str:
    """A self-contained HTML page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{chart.STYLE}{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table; columns of numbers are right-aligned."""
    body = [list(row) for row in rows]
    numeric = [all(_is_figure(row[at]) for row in body) for at in range(len(head))]

    def line(cells: Sequence[Any], tag: str) -> str:
        looks = (' class="number"' if right else "" for right in numeric)
        return (
            "<tr>"
            + "".join(f"<{tag}{look}>{escape(_show(cell))}</{tag}>" for cell, look in zip(cells, looks, strict=True))
            + "</tr>"
        )

    return f'<div class="wide"><table>{line(head, "th")}{"".join(line(row, "td") for row in body)}</table></div>'


def _is_figure(cell: Any) -> bool:
    return isinstance(cell, int | float) or re.fullmatch(r"-|[\d.,]+(e[+-]\d+|%| ± [\d.,]+)?", str(cell)) is not None


def _show(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.4f}" if abs(cell) < 10 else f"{cell:,.1f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def facts(report: PruneReport) -> str:
    """Tiles with the main figures."""
    seconds = report.seconds.get("total")
    error = ("mean layer error" if report.layers else "mean error", f"{report.mean_error:.4f}", "relative, squared")
    found = [
        *([error] if report.layers or report.mixtures else []),
        *_amounts(report),
        ("time", duration(seconds) if seconds else "-", f"{duration(report.seconds.get('prune', 0))} of it pruning"),
        ("memory", size(report.peak_memory) if report.peak_memory else "-", "peak"),
    ]
    if report.evaluation:
        text = evaluation_text(report.evaluation)
        found[:0] = [
            (f"perplexity, {key}", perplexity_text(report.evaluation[key]), text) for key in ("dense", "pruned")
        ]
    tiles = [f"<div><dt>{a}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in found]
    return f'<dl class="facts">{"".join(tiles)}</dl>'


def _distillation(report: PruneReport) -> list[str]:
    """What the distillation did, and the divergence as it went on; the rest of the page is from before it."""
    if not (done := report.distillation):
        return []
    rows = [(one["step"], one["divergence"]) for one in done["divergences"]]
    note = "The weights with the least held-out divergence were kept. All else on this page is from before it."
    return [
        "<h2>Distillation</h2>",
        table(("", ""), distillation_rows(done)),
        f'<p class="note">{note}</p>',
        table(("step", "held-out divergence, nats per token"), rows),
    ]


def _amounts(report: PruneReport) -> list[tuple[str, str, str]]:
    """Tiles that say how much was removed, and how much of what is left is zero."""
    kept, _, fewer = parameters_text(report.model).partition(" parameters ")
    share, _, where = pruned_text(report).partition(" ")
    removed = [
        ("parameters", kept, fewer),
        ("size", f"{size(report.size['dense'])} -> {size(report.size['pruned'])}", "of the weights"),
    ]
    zeros = [
        ("pruned", share, where),
        ("in the blocks", f"{report.coverage['fraction']:.1%}", "of the parameters lie in these layers"),
    ]
    return (removed if report.sparsity["removed"] else []) + ([] if removes_only(report.sparsity) else zeros)


def by_kind(layers: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    """Local name of a layer -> its value in every block, NaN where a block has no such layer; experts' mean is one."""
    found: dict[str, dict[int, list[float]]] = {}
    for name, value in layers:
        block, local = split_name(name)
        found.setdefault(EXPERT.sub("*", local), {}).setdefault(block, []).append(value)
    blocks = 1 + max((max(row) for row in found.values()), default=0)
    return {
        local: [sum(row[block]) / len(row[block]) if block in row else math.nan for block in range(blocks)]
        for local, row in found.items()
    }


def _errors(report: PruneReport) -> list[str]:
    if not report.layers:
        return []
    worst = max(layer.error for layer in report.layers)
    raised = [layer for layer in report.layers if layer.status != "ok"]
    stats = [key for key in STATS if any(key in layer.stats for layer in report.layers)]
    head = ["layer", "shape", "pattern", "error", "pruned", "unpruned zeros", "status", *(STATS[key] for key in stats)]
    return [
        "<h2>Error by block and layer</h2>",
        '<p class="note">Relative squared error of each layer&#39;s output on the calibration text, '
        "before block-wise reconstruction.</p>",
        chart.heat_map(by_kind((layer.name, layer.error) for layer in report.layers), worst),
        chart.scale(worst),
        f"<p>{len(raised)} of {len(report.layers)} layers needed special care"
        + (f", such as {escape(raised[0].name)}: {escape(raised[0].status)}" if raised else "")
        + ".</p>",
        f"<details><summary>All {len(report.layers)} layers</summary>",
        table(head, [_row(layer, stats) for layer in report.layers]),
        "</details>",
    ]


def _row(layer: LayerReport, stats: Sequence[str]) -> list[Any]:
    ratio = layer.pruned / (layer.shape[0] * layer.shape[1])
    figures = [f"{layer.stats[key]:.3g}" if key in layer.stats else "-" for key in stats]
    shape = f"{layer.shape[0]} x {layer.shape[1]}"
    return [layer.name, shape, layer.pattern, layer.error, f"{ratio:.2%}", layer.unpruned_zeros, layer.status, *figures]


def _inputs(report: PruneReport) -> list[str]:
    """The conditioning of the layers' least-squares problems."""
    known = [layer for layer in report.layers if "top_eigenvalue_ratio" in layer.stats]
    if not known:
        return []
    rows = by_inputs(by_kind((layer.name, layer.stats["top_eigenvalue_ratio"]) for layer in known))
    conditions = [(layer.stats["condition"], layer.name) for layer in known if "condition" in layer.stats]
    worst = max(conditions, default=None)
    worst_text = f"The worst condition of a damped Gram was {worst[0]:.2g}, of {worst[1]}." if worst else ""
    return [
        "<h2>Inputs in one direction</h2>",
        '<p class="note">Largest eigenvalue of the Gram of each layer&#39;s inputs over their sum. Near 1, a few '
        "inputs or tokens outweigh all others, and the damping dominates the fit of the rest. "
        "+2: two more layers have these inputs.</p>",
        chart.heat_map(rows, 1.0),
        chart.scale(1.0),
        f"<p>{escape(worst_text)}</p>" if worst_text else "",
    ]


def by_inputs(rows: dict[str, list[float]]) -> dict[str, list[float]]:
    """The rows with layers of the same inputs, and hence the same values, merged: `q_proj +2`."""
    groups: dict[str, list[str]] = {}
    for label, values in rows.items():
        groups.setdefault(repr(values), []).append(label)
    return {names[0] + (f" +{len(names) - 1}" if names[1:] else ""): rows[names[0]] for names in groups.values()}


def _mixtures(report: PruneReport) -> list[str]:
    """The experts that every block kept, and the errors of the mixtures' outputs."""
    if not report.mixtures:
        return []
    head = ["block", "experts", "kept", "super experts", "error before the refit", "error", "ridge"]
    rows = [
        [
            mixture.block,
            f"{len(mixture.kept)} of {mixture.experts}",
            ", ".join(map(str, mixture.kept)),
            ", ".join(map(str, mixture.super_experts)) or "-",
            mixture.error_uncompensated,
            mixture.error,
            "-" if mixture.ridge is None else f"{mixture.ridge:g}",
        ]
        for mixture in report.mixtures
    ]
    return [
        "<h2>Experts</h2>",
        '<p class="note">Relative squared error of each mixture&#39;s output on the calibration text.</p>',
        table(head, rows),
    ]


def _reconstructions(report: PruneReport) -> list[str]:
    if not report.reconstructions:
        return []
    return [
        "<h2>Block-wise reconstruction</h2>",
        '<p class="note">Relative squared error of each block&#39;s output on held-out calibration text.</p>',
        chart.lines(
            {
                "before": [item.before for item in report.reconstructions],
                "after": [item.after for item in report.reconstructions],
            }
        ),
    ]


def _blocks(report: PruneReport) -> list[str]:
    known = [name for name in STAGES if name in report.seconds]
    stages = table(["stage", "seconds"], [(STAGES[name], f"{report.seconds[name]:,.1f}") for name in known])
    if not report.blocks:
        return ["<h2>Time</h2>", stages]
    memory = {
        "at the end of a block": [block.memory / 2**20 for block in report.blocks],
        "largest until then": [block.peak_memory / 2**20 for block in report.blocks],
    }
    return [
        "<h2>Seconds a block</h2>",
        chart.lines({"seconds": [block.seconds for block in report.blocks]}),
        "<h2>Memory, MiB</h2>",
        '<p class="note">Resident size of the process.</p>',
        # Older reports have only the largest.
        chart.lines({name: values for name, values in memory.items() if any(values)}, "{:,.0f}".format),
        "<h2>Time</h2>",
        stages,
    ]


def _generations(report: PruneReport) -> list[str]:
    if not report.generations:
        return ['<p class="note">No generated text yet: <code>llmprune report DIR --generate 40</code> adds some.</p>']
    rows = [(item.prompt, item.dense, item.pruned) for item in report.generations]
    return [
        "<h2>Generated text</h2>",
        '<p class="note">Greedy continuations; a few samples prove nothing, but show what a perplexity feels like.</p>',
        table(["text", "dense", "pruned"], rows),
    ]


def _provenance(report: PruneReport) -> list[str]:
    calibration = report.calibration
    rows = [
        ("model", f"{report.model['name']} {report.model['revision']}"),
        *([("its weights", text)] if (text := quantization_text(report.model)) else []),
        ("calibration", calibration_text(calibration)),
        ("its sha256", calibration["sha256"]),
        *([("evaluation", report.evaluation["source"])] if report.evaluation else []),
        ("recipe", recipe_text(report.recipe)),
        ("machine", ", ".join(f"{key} {value}" for key, value in report.machine.items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in report.versions.items())),
        *([] if removes_only(report.sparsity) else [("coverage", coverage_text(report.coverage))]),
    ]
    command = f"<pre>{escape(report.command)}</pre>" if report.command else ""
    return ["<h2>How it was made</h2>", command, table(["", ""], rows)]
