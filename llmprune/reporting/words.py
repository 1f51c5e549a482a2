"""The facts of a report as text, for the terminal, the page, the model card and the notebook alike."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llmprune.errors import printable
from llmprune.model.auto_class import CAUSAL, WRAPPER
from llmprune.pruning.recipe import Recipe


def escape(text: object) -> str:
    """A text for a page: printable, and no markup."""
    return html.escape(printable(text))


def markdown(text: object) -> str:
    """A text for a card: printable, in one line, and no markup."""
    return re.sub(r"([\\`|<\[\]])", r"\\\1", printable(text))


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


def count(number: int) -> str:
    """A number of parameters: `134,500,000` -> `134.5 M`."""
    return f"{number:,}" if number < 1e6 else f"{number / 1e6:,.1f} M"


def perplexity_text(perplexity: Mapping[str, float]) -> str:
    """Perplexity ± standard error."""
    return f"{perplexity['value']:.2f} ± {perplexity['error']:.2f}"


def evaluation_text(evaluation: Mapping[str, Any]) -> str:
    """Text, number and length of the evaluation windows, and how they begin."""
    source = Path(evaluation["source"]).name
    return f"{source}, {evaluation['samples']} windows of {evaluation['seq_len']} tokens{bos_text(evaluation)}"


def calibration_text(calibration: Mapping[str, Any]) -> str:
    """Number, length, source and seed of the calibration windows, and how they begin."""
    seed = f", seed {calibration['seed']}" if calibration["seed"] is not None else ""
    more = calibration.get("self_generated", 0)
    generated = f", and {more} self-generated {'window' if more == 1 else 'windows'}" if more else ""
    part = f", from its first {characters:,} characters" if (characters := calibration.get("characters")) else ""
    size = f"{calibration['samples']} x {calibration['seq_len']} tokens"
    return f"{size} of {calibration['source']}{part}{seed}{generated}{bos_text(calibration)}"


def bos_text(windows: Mapping[str, Any]) -> str:
    """Whether windows begin with BOS; '' where that was not recorded."""
    if (count := windows.get("bos_tokens")) is None:
        return ""
    return f", begun {'with' if count else 'without'} BOS"


def recipe_text(settings: Mapping[str, Any]) -> str:
    """The stages of a recipe, and the effort that set them."""
    effort = f" (effort {settings['effort']})" if settings["effort"] else ""
    return Recipe.from_report(settings).describe() + effort


def coverage_text(coverage: Mapping[str, Any]) -> str:
    """The fraction of the block parameters in pruned layers, and the reasons for the rest."""
    total = coverage["block_parameters"]
    text = f"pruned layers hold {coverage['fraction']:.1%} of {total / 1e6:.1f} M block parameters"
    dense = [f"{reason} {weights / total:.1%}" for reason, weights in coverage["skipped"].items()]
    return text + (f"; left dense: {', '.join(dense)}" if dense else "")


def loader_of(model: Mapping[str, Any]) -> str:
    """The automatic class that loads a model; reports of older versions know one only."""
    return WRAPPER if model.get("loader") == WRAPPER else CAUSAL


def quantization_text(model: Mapping[str, Any]) -> str:
    """How the weights of the dense model are stored, and what they became; '' where they are plain."""
    if not (form := model.get("stored_as")):
        return ""
    return f"stored as {form}; dequantised to {model.get('dequantized_to')}"


def grid_text(quantization: Mapping[str, Any]) -> str:
    """The grid of the written weights, and the format of the files; '' where they are floating point."""
    if not quantization:
        return ""
    return f"{quantization['meaning']}; stored as {quantization['format']}"


def distillation_rows(distillation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a distillation did, and what it came to, as named figures; empty where there was none."""
    if not distillation:
        return []
    before, after, kept = (distillation[key] for key in ("divergence_before", "divergence_after", "kept_step"))
    rows = []
    if evaluation := distillation["evaluation"]:
        pair = " -> ".join(perplexity_text(evaluation[key]) for key in ("before", "after"))
        rows += [("perplexity", f"{pair} by distillation"), ("measured on", evaluation_text(evaluation))]
    step = f"step {kept} of {distillation['steps']}" if kept else "the start: no step was better"
    return [
        *rows,
        ("divergence", f"{before:.4f} -> {after:.4f} nats per token, held out; kept: {step}"),
        ("teacher", distillation["teacher"]),
        ("trained on", training_text(distillation)),
        ("loss", loss_text(distillation)),
        ("time", duration(distillation["seconds"]["total"])),
    ]


def training_text(distillation: Mapping[str, Any]) -> str:
    """The tokens of a distillation, and what trained on them."""
    generated = distillation["generated"]
    also = f", {generated} windows of them from the teacher" if generated else ""
    passes = f", {distillation['epochs']} times" if distillation["epochs"] > 1 else ""
    return (
        f"{distillation['tokens']:,} tokens of {distillation['text']['source']}{also}{passes}; "
        f"{distillation['optimizer']}, learning rate {distillation['learning_rate']:g}, {distillation['precision']}"
    )


def loss_text(distillation: Mapping[str, Any]) -> str:
    """The loss of a distillation."""
    text = f"divergence at temperature {distillation['temperature']:g}"
    if mix := distillation["mix"]:
        text += f", and {mix:.0%} cross-entropy of the text"
    return text


def tower_text(model: Mapping[str, Any]) -> str:
    """What of a wrapper was pruned, and what stayed; '' where a model is nothing but its language model."""
    if not (beside := model.get("parameters_beside")):
        return ""
    inside = f"{model['tower']}, the language model inside; unchanged beside it: {model['beside']}"
    return f"{inside} ({count(beside)} of {count(model['parameters'])} parameters)"


def super_experts_text(mixtures: Sequence[Any], guard: bool) -> str:
    """The super experts that were found, and what became of them; '' where there are none."""
    found = [(mixture, expert) for mixture in mixtures for expert in mixture.super_experts]
    if not found:
        return ""
    kept = sum(expert in mixture.kept for mixture, expert in found)
    named = ", ".join(f"{expert} of {mixture.block}" for mixture, expert in found[:3])
    more = ", ..." if len(found) > 3 else ""
    return f"super experts: {len(found)} found ({named}{more}), {kept} kept{'' if guard else ' without a guard'}"


def removes_only(sparsity: Mapping[str, Any]) -> bool:
    """Whether blocks, channels, heads or experts are removed, and no weights are pruned by a pattern."""
    return bool(sparsity["removed"]) and not sparsity["fraction"]


def parameters_text(model: Mapping[str, Any]) -> str:
    """The parameters of the whole model, before and after a removal."""
    before = model["parameters"]
    after = model.get("parameters_left", before)
    return f"{count(before)} -> {count(after)} parameters ({1 - after / max(before, 1):.1%} fewer)"


class Figures(Protocol):
    """The figures of a report that are put into words."""

    recipe: dict[str, Any]
    sparsity: dict[str, Any]
    quantization: dict[str, Any]

    @property
    def layers(self) -> Sequence[Any]:
        """The reports of the layers."""
        ...

    @property
    def mixtures(self) -> Sequence[Any]:
        """The reports of the mixtures that lost experts."""
        ...

    @property
    def weights(self) -> int:
        """Number of weights in them."""
        ...

    @property
    def pruned_ratio(self) -> float:
        """Ratio of the pruned weights."""
        ...

    @property
    def mean_error(self) -> float:
        """Mean relative output error."""
        ...


def pruned_text(report: Figures) -> str:
    """The ratio of pruned weights in the pruned layers, those that are removed among them."""
    # Blocks and experts that went are not among these layers.
    narrowed = any(not text.startswith(("blocks", "experts")) for text in report.sparsity["removed"])
    how = " are removed or zero" if narrowed else ""
    return f"{report.pruned_ratio:.2%} of {count(report.weights)} weights in {len(report.layers)} layers{how}"


def error_name(report: Figures) -> str:
    """What `error_text` tells; '' where no layer was solved and no mixture lost experts."""
    if not report.layers and not report.mixtures:
        return ""
    return f"mean relative {'layer ' if report.layers else ''}error"


def error_text(report: Figures) -> str:
    """The mean layer error; of layers with removed inputs also before and after compensation; that of mixtures."""
    texts = [_layer_error(report)] if report.layers or not report.mixtures else []
    if report.mixtures:
        pairs = [(mixture.error_uncompensated, mixture.error) for mixture in report.mixtures]
        before, after = (sum(errors) / len(pairs) for errors in zip(*pairs, strict=True))
        refitted = f" before compensation, {after:.4f} after" if report.recipe["compensate"] else ""
        texts.append(f"of mixtures that lost experts {before:.4f}{refitted}")
    return "; ".join(texts)


def _layer_error(report: Figures) -> str:
    mean = f"{report.mean_error:.4f}"
    found = [
        (layer.stats["error_uncompensated"], layer.stats.get("error_compensated", layer.error), layer.error)
        for layer in report.layers
        if "error_uncompensated" in layer.stats
    ]
    if not found or not report.recipe["compensate"]:
        return mean
    before, after, now = (sum(errors) / len(found) for errors in zip(*found, strict=True))
    text = f"{mean}; of layers with removed inputs {before:.4f} before compensation, {after:.4f} after"
    done = ["pruned"] if report.sparsity["fraction"] else []
    done += ["quantised"] if report.quantization else []
    return text + (f", {now:.4f} with the weights {' and '.join(done)}" if now != after else "")
