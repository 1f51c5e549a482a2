"""The files of a finished folder beside its weights: config, companions of the source, card and report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from llmprune.model.companions import copy_companions, copy_json
from llmprune.model.quantization import without_quantization
from llmprune.model.quantization_section import config_section
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.steps import skeleton_of
from llmprune.reporting.html_report import PAGE, write_report
from llmprune.reporting.model_card import FILE as CARD
from llmprune.reporting.model_card import model_card
from llmprune.reporting.report import FILE, PruneReport
from llmprune.runtime.files import write_text
from llmprune.runtime.ownership import regular_files
from llmprune.runtime.redact import without_origins
from llmprune.structure.written_config import smaller_config


def write_companions(run: RunContext, report: PruneReport) -> None:
    """Everything in the folder besides the weights."""
    report.warnings += [
        f"left out: {path.relative_to(run.source.folder)} is a link that leaves the model folder, or no regular file"
        for path in copy_companions(run.source.folder, run.unfinished)
    ]
    quantized = [layer.name for layer in report.layers if layer.grid]
    copy_json(run.source.folder / "config.json", run.unfinished / "config.json", partial(pruned_config, run, quantized))
    report.size = {
        "dense": run.skeleton.checkpoint.folder.nbytes,
        "pruned": sum(path.stat().st_size for path in run.unfinished.glob("*.safetensors")),
    }
    write_text(run.unfinished / CARD, model_card(report, run.source.folder))
    written, _ = regular_files(run.unfinished)
    report.files = sorted({FILE, PAGE, *(path.relative_to(run.unfinished).as_posix() for path in written)})
    write_report(report, run.unfinished)


def pruned_config(run: RunContext, quantized: Collection[str], source: Mapping[str, Any]) -> dict[str, Any]:
    """The source's config with the sizes and the dtype of the pruned model; all else stays.

    Args:
        run: the job.
        quantized: full names of the layers on a grid.
        source: the source's config.
    """
    config: dict[str, Any] = without_quantization(without_origins(source))
    config = smaller_config(run.structure, config)
    if dtype := run.job.dtype or run.dequantized_dtype:
        # Older readers know the older name only.
        names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
        config |= dict.fromkeys(names, dtype)
    if run.grid is not None:
        written = run.skeleton if run.structure.kept_blocks is None else skeleton_of(run, run.unfinished)
        config["quantization_config"] = config_section(run.grid, written, quantized)
    return config
