"""The model card of a pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llmprune.errors import printable
from llmprune.model.auto_class import CAUSAL
from llmprune.pruning.recipe import GPTQ
from llmprune.reporting.report import PruneReport
from llmprune.reporting.words import (
    bos_text,
    calibration_text,
    distillation_rows,
    error_name,
    error_text,
    evaluation_text,
    grid_text,
    loader_of,
    markdown,
    parameters_text,
    perplexity_text,
    quantization_text,
    recipe_text,
    removes_only,
    size,
    super_experts_text,
    tower_text,
)
from llmprune.runtime.foreign import read_json, read_text, reading
from llmprune.runtime.redact import HUB_ID
from llmprune.sources.texts import DATASETS

FILE, SPEED = "README.md", "speed.json"
INHERITED = ("language", "license", "license_name", "license_link")
LOADED = 'from_pretrained("{}")'
TITLES = ("\n# {}\n", "\n- name: {}\n")
"""The lines of a card that hold the name of the model."""
LOAD = """\
```python
from transformers import {loader}, {texts}

model = {loader}.from_pretrained("{name}")
{texts_name} = {texts}.from_pretrained("{name}")
```

{readers}{note}.
`prune_report.json` has every layer's error; `llmprune verify DIR` checks the pattern."""
ZEROS = "The pruned weights are exact zeros in plain safetensors, so every loader reads them. "
RUNS = "Readers of the dense model read this one too: transformers, llama.cpp (converted to GGUF) and MLX were tried. "
HEADS = "CTranslate2 is not among them: it takes hidden size / heads for the width of a head. "
CONTINUE = """\
An ordinary fine-tune fills the zeros in. `Trainer(..., callbacks=[llmprune.KeepZeros()])` keeps them; in a loop of your
own, put them back after every step of the optimiser:

```python
import torch

masks = {name: weight != 0 for name, weight in model.named_parameters()}
# ... loss.backward(); optimizer.step()
with torch.no_grad():
    for name, weight in model.named_parameters():
        weight.mul_(masks[name])
```

Quantise after pruning, and count the zeros. Rounding to nearest on values with an exact zero keeps them (symmetric int8
and int4, nf4, Q8_0, Q6_K, Q5_0, Q4_0); a minimum or a zero point (Q4_K, Q4_1, asymmetric int4) loses them; GPTQ fills
some in."""


def model_card(report: PruneReport, source: Path) -> str:
    """A card with valid metadata: how the model was made, its perplexity, and how to load and train it.

    Args:
        report: the run.
        source: folder of the dense model; its card gives licence, language and base model.
    """
    name, zeros = printable(Path(report.out).name), report.sparsity["fraction"] > 0
    loader = loader_of(report.model)
    texts = "AutoTokenizer" if loader == CAUSAL else "AutoProcessor"
    rows = "\n".join(f"| {markdown(key)} | {markdown(value)} |" for key, value in _facts(report))
    parts = [
        f"---\n{_metadata(report, source, name)}\n---",
        f"# {name}",
        f"{markdown(_origin(report, source))} {', '.join(_done(report))} with llmprune {report.llmprune}: "
        f"{_meaning(report)}, by {recipe_text(report.recipe)}.",
        f"| | |\n|---|---|\n{rows}",
        *(f"> {markdown(warning)}" for warning in report.warnings),
        "## Load",
        LOAD.format(
            name=name,
            loader=loader,
            texts=texts,
            texts_name=texts.removeprefix("Auto").lower(),
            readers=_readers(report),
            note=report.sparsity["note"],
        ),
        "## How it was made",
        _made(report),
        *(["## Continue", CONTINUE] if zeros else []),
    ]
    return "\n\n".join(parts) + "\n"


def _done(report: PruneReport) -> list[str]:
    """What was done to the model, a word for each."""
    pruned = bool(report.sparsity["fraction"] > 0 or report.sparsity["removed"])
    steps = {"pruned": pruned, "quantised": bool(report.quantization), "distilled": bool(report.distillation)}
    return [word for word, done in steps.items() if done]


def _meaning(report: PruneReport) -> str:
    parts = [report.sparsity["meaning"]] if "pruned" in _done(report) else []
    return "; ".join(parts + ([report.quantization["meaning"]] if report.quantization else []))


def _readers(report: PruneReport) -> str:
    """What reads the folder."""
    if report.quantization:
        return ""
    # Of wrappers, no other reader was tried.
    removed = [] if report.model.get("parameters_beside") else report.sparsity["removed"]
    zeros = ZEROS if report.sparsity["fraction"] > 0 else ""
    return zeros + (RUNS if removed else "") + (HEADS if any(text.startswith("heads") for text in removed) else "")


def card_for(folder: Path, report: PruneReport, repo: str) -> str:
    """The card of a folder for an upload, with the name of the repository as the model's.

    It includes the speed where `python -m eval.speed DENSE DIR --out DIR/speed.json` was run.

    Args:
        folder: as `prune` wrote it; its card may have been edited or deleted since.
        report: of the folder.
        repo: `ORG/NAME`.

    Raises:
        InputError: `speed.json` is no result of `eval.speed`.
    """
    path, local = folder / FILE, printable(Path(report.out).name)
    with reading(f"{path} cannot be read", "write it anew, or delete it"):
        text = read_text(path) if path.exists() else model_card(report, folder)
    if (speed := folder / SPEED).exists():
        text = text.replace("\n## Load\n", f"\n## Speed\n\n{_speed(speed)}\n\n## Load\n", 1)
    for form in TITLES:
        text = text.replace(form.format(local), form.format(repo.partition("/")[2]))
    return text.replace(LOADED.format(local), LOADED.format(repo))


def _speed(path: Path) -> str:
    """The result of `eval.speed` as a table."""
    with reading(f"{path} is no result of eval.speed", "measure again, or delete it"):
        found = read_json(path)
        settings = ", ".join(f"{key} {value}" for key, value in found["settings"].items() if value is not None)
        kinds = {"speedup": ("pruned", ""), "sparse_speedup": ("sparse", " (sparse kernels)")}
        rows = [
            f"| {measure}, tokens/s{note} | {found['dense'][measure]:.1f} | {found[name][measure]:.1f} "
            f"| {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) |"
            for kind, (name, note) in kinds.items()
            if kind == "speedup" or kind in found
            for measure, ratio in found[kind].items()
        ]
    head = "| | dense | pruned | pruned / dense (quartiles) |\n|---|--:|--:|--:|"
    return "\n".join([head, *rows, "", f"Measured side by side: {settings}."])


def _metadata(report: PruneReport, source: Path, name: str) -> str:
    inherited = _inherited(source / FILE)
    data = ModelCardData(
        base_model=_base(report, inherited),
        library_name="transformers",
        pipeline_tag="text-generation" if loader_of(report.model) == CAUSAL else "image-text-to-text",
        tags=_tags(report),
        model_name=name if _results(report) else None,
        eval_results=_results(report) or None,
        ignore_metadata_errors=True,
        **{key: inherited.get(key) for key in INHERITED},
    )
    return data.to_yaml()


def _tags(report: PruneReport) -> list[str]:
    """The tags of the card."""
    tags = [word.replace("quantised", "quantized") for word in _done(report)]
    tags += ["sparse"] if report.sparsity["fraction"] else []
    tags += ["compressed-tensors"] if report.quantization else []
    # To the Hub, that name as a tag is another format.
    return [*tags, "llmprune", *([name] if (name := report.method["name"]) != GPTQ else [])]


def _base(report: PruneReport, inherited: dict[str, Any]) -> Any:
    """The dense model on the Hub; those of its own card where it is a folder; None where that is unknown."""
    if report.model["revision"]:
        return report.model["name"]
    base = inherited.get("base_model")
    # Trainers write where the model lay.
    named = [one for one in (base if isinstance(base, list) else [base]) if HUB_ID.fullmatch(str(one or ""))]
    return named if named[1:] else next(iter(named), None)


def _origin(report: PruneReport, source: Path) -> str:
    base = _base(report, _inherited(source / FILE))
    return base if isinstance(base, str) else str(report.model["name"])


def _inherited(card: Path) -> dict[str, Any]:
    """The metadata of the dense model's card; empty where it cannot be read."""
    if not card.exists():
        return {}
    try:
        metadata: dict[str, Any] = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:
        # Cards are written by people; whatever is wrong with one must not cost a finished run.
        return {}
    return metadata


def _results(report: PruneReport) -> list[EvalResult]:
    """The perplexities as results of the model index."""
    return [*_distilled_results(report), *_pruned_results(report)]


def _distilled_results(report: PruneReport) -> list[EvalResult]:
    if not (evaluation := report.distillation.get("evaluation")):
        return []
    return _entries(evaluation, {"after": "perplexity", "before": "perplexity before distillation"})


def _pruned_results(report: PruneReport) -> list[EvalResult]:
    """The perplexities measured when the model was pruned; of one that was distilled since, the dense model's."""
    if (evaluation := report.evaluation) is None:
        return []
    names = {} if report.distillation else {"pruned": "perplexity"}
    return _entries(evaluation, names | {"dense": "perplexity of the dense model"})


def _entries(evaluation: dict[str, Any], names: dict[str, str]) -> list[EvalResult]:
    windows = f"context {evaluation['seq_len']}{bos_text(evaluation)}"
    return [
        EvalResult(
            task_type="text-generation",
            **_dataset(evaluation["source"]),
            metric_type="perplexity",
            metric_name=f"{name}, {windows}",
            metric_value=round(evaluation[key]["value"], 4),
        )
        for key, name in names.items()
    ]


def _dataset(source: str) -> dict[str, Any]:
    """The data set fields of the model index for a text."""
    entry = DATASETS.get(source)
    if entry is None or not entry.repo:
        return {"dataset_type": Path(source).name, "dataset_name": entry.help if entry else Path(source).name}
    return {
        "dataset_type": entry.repo,
        "dataset_name": entry.help,
        "dataset_config": entry.config or entry.folder,
        "dataset_split": entry.evaluation,
    }


def _facts(report: PruneReport) -> list[tuple[str, str]]:
    calibration, coverage, machine = report.calibration, report.coverage, report.machine
    pattern = f"{report.sparsity['pattern']}, in {coverage['fraction']:.1%} of the block parameters"
    facts = [(f"distilled: {key}", text) for key, text in distillation_rows(report.distillation)]
    if (evaluation := report.evaluation) is not None:
        text = evaluation_text(evaluation)
        facts += [(f"perplexity, {key} ({text})", perplexity_text(evaluation[key])) for key in ("dense", "pruned")]
    facts += [
        *([("dense weights", text)] if (text := quantization_text(report.model)) else []),
        *([("pruned part", text)] if (text := tower_text(report.model)) else []),
        *([("quantised", text)] if (text := grid_text(report.quantization)) else []),
        *[("removed", text) for text in report.sparsity["removed"]],
        *([("parameters", parameters_text(report.model))] if report.sparsity["removed"] else []),
        *([] if removes_only(report.sparsity) else [("pattern", pattern)]),
        *([(name, error_text(report))] if (name := error_name(report)) else []),
        *([("guard", text)] if (text := super_experts_text(report.mixtures, report.recipe.get("guard", True))) else []),
        ("size of the weights", f"{size(report.size['pruned'])} (dense {size(report.size['dense'])})"),
        ("calibration", calibration_text(calibration)),
    ]
    if "prune" in report.seconds:
        facts.append(("time to prune", f"{report.seconds['prune']:.0f} s on {machine['device']}"))
    return facts


def _made(report: PruneReport) -> str:
    """What is needed to reproduce the run: command, tokens, versions."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    calibration = report.calibration
    seed = f", seed {calibration['seed']}" if calibration["seed"] is not None else ""
    tokens = (
        f"The calibration tokens (sha256 `{calibration['sha256']}`{seed}) come from {markdown(calibration['source'])}."
    )
    if more := calibration.get("self_generated"):
        tokens += f" The dense model generated {more} more windows (sha256 `{calibration['self_generated_sha256']}`)."
    command = f"```\n{printable(report.command)}\n```\n\n" if report.command else ""
    return f"{command}{tokens} Made with {versions}.{_taught(report)}"


def _taught(report: PruneReport) -> str:
    """What is needed to repeat the distillation; '' where there was none."""
    if not (facts := report.distillation):
        return ""
    command = f"\n\n```\n{printable(facts['command'])}\n```" if facts["command"] else ""
    return (
        f"\n\nThen it was trained on the next-token distributions of {markdown(facts['teacher'])} with all zeros and "
        f"sizes held; gradients crossed the whole model. Tokens: sha256 `{facts['sha256']}`. The errors of layers and "
        f"the perplexities of the pruned model are those before that.{command}"
    )
