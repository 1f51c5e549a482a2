"""The model card of a pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llmprune.report import PruneReport


def model_card(report: PruneReport, source: Path) -> str:
    """A card with valid metadata and the measured numbers.

    Args:
        report: the run.
        source: folder of the dense model; licence, language and base model are carried over from its card.
    """
    name = Path(report.out).name
    inherited = _inherited(source / "README.md")
    pattern = report.sparsity["pattern"]
    base = report.model["name"] if report.model["revision"] else inherited.get("base_model")
    data = ModelCardData(
        base_model=base,
        language=inherited.get("language"),
        license=inherited.get("license"),
        license_name=inherited.get("license_name"),
        license_link=inherited.get("license_link"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "sparse", "llmprune", report.method["name"]],
        model_name=name if report.evaluation else None,
        eval_results=_results(report) or None,
        ignore_metadata_errors=True,
    )
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {name}",
        "",
        f"{report.model['name']} pruned with llmprune {report.llmprune}: "
        f"method `{report.method['name']}`, {report.sparsity['meaning']}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(report, pattern)),
        "",
        "```",
        report.command,
        "```",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
        "",
        "The pruned weights are exact zeros in plain safetensors: every loader reads them, the files are no smaller,",
        "and a runtime that knows nothing of the zeros is no faster. `prune_report.json` has every layer's error.",
        "",
    ]
    return "\n".join(lines)


def _inherited(card: Path) -> dict[str, Any]:
    """The metadata of the source's card, as far as it can be read."""
    if not card.exists():
        return {}
    try:
        metadata: dict[str, Any] = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:
        # Cards are written by people; whatever is wrong with one must not cost a finished run.
        return {}
    return metadata


def _results(report: PruneReport) -> list[EvalResult]:
    if report.evaluation is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=Path(report.evaluation["source"]).name,
            dataset_name=Path(report.evaluation["source"]).name,
            metric_type="perplexity",
            metric_name=f"perplexity, context {report.evaluation['seq_len']}",
            metric_value=round(report.evaluation["pruned"]["value"], 4),
        )
    ]


def _facts(report: PruneReport, pattern: str) -> list[tuple[str, str]]:
    calibration, coverage = report.calibration, report.coverage
    facts = [
        ("pattern", f"{pattern}, in {coverage['fraction']:.1%} of the block parameters"),
        ("calibration", f"{calibration['samples']} x {calibration['seq_len']} tokens of {calibration['source']}"),
        ("mean relative layer error", f"{report.mean_error:.4f}"),
    ]
    if (evaluation := report.evaluation) is not None:
        text = f"{Path(evaluation['source']).name}, {evaluation['samples']} windows of {evaluation['seq_len']}"
        for key in ("dense", "pruned"):
            value = evaluation[key]
            facts.append((f"perplexity, {key} ({text})", f"{value['value']:.2f} ± {value['error']:.2f}"))
    facts.append(
        (
            "size of the weights",
            f"{report.size['pruned'] / 2**20:.0f} MiB (dense {report.size['dense'] / 2**20:.0f} MiB)",
        )
    )
    return facts
