"""The report of a run as data: `prune_report.json`. Every key is documented in docs/reference/report.md."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmprune.pruning.recipe import Recipe
from llmprune.reporting import words
from llmprune.reporting.form import MOST_BLOCKS, fault
from llmprune.reporting.schema import SCHEMA, upgraded
from llmprune.runtime.foreign import about, check_inside, read_json, reading

FILE = "prune_report.json"


def split_name(layer: str) -> tuple[int, str]:
    """`model.layers.3.mlp.up_proj` -> 3, `mlp.up_proj`."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", layer)
    return (int(match[1]), match[2]) if match else (0, layer)


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One pruned layer; see docs/reference/report.md."""

    name: str
    shape: tuple[int, int]
    pattern: str
    pruned: int
    unpruned_zeros: int
    error: float
    status: str
    tokens: int
    stats: dict[str, float]
    grid: str = ""


@dataclass(frozen=True, slots=True)
class BlockReconstruction:
    """The error of a block before and after its reconstruction; see docs/reference/report.md."""

    block: str
    before: float
    after: float
    skipped_steps: int = 0


@dataclass(frozen=True, slots=True)
class MixtureReport:
    """The experts that a block lost, and the error of the others' sum; see docs/reference/report.md."""

    block: str
    experts: int
    kept: list[int]
    super_experts: list[int]
    tokens: list[int]
    error_uncompensated: float
    error: float
    ridge: float | None
    retries: int


@dataclass(frozen=True, slots=True)
class BlockReport:
    """Time and memory of a block; see docs/reference/report.md."""

    name: str
    seconds: float
    peak_memory: int
    memory: int = 0
    expert_tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Generation:
    """Continuations of a text by the dense and the pruned model; see docs/reference/report.md."""

    prompt: str
    dense: str
    pruned: str


@dataclass(slots=True)
class PruneReport:
    """One run; see docs/reference/report.md."""

    llmprune: str
    command: str
    versions: dict[str, str]
    model: dict[str, Any]
    sparsity: dict[str, Any]
    method: dict[str, Any]
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    evaluation: dict[str, Any] | None
    coverage: dict[str, Any]
    quantization: dict[str, Any] = field(default_factory=dict)
    distillation: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    reconstructions: list[BlockReconstruction] = field(default_factory=list)
    mixtures: list[MixtureReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    size: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    processes: dict[str, Any] = field(default_factory=dict)
    peak_memory: int = 0
    baseline_memory: int = 0
    fingerprint: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    out: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        value: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, **asdict(self)}))
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PruneReport:
        """The inverse of `to_json`; reads older schemas too.

        Raises:
            InputError: the schema is newer than this version of llmprune.
        """
        value = upgraded(value)
        del value["schema"]
        layers = [LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in value["layers"]]
        reconstructions = [BlockReconstruction(**item) for item in value["reconstructions"]]
        mixtures = [MixtureReport(**item) for item in value.get("mixtures", ())]
        blocks = [BlockReport(**block) for block in value.get("blocks", ())]
        generations = [Generation(**item) for item in value.get("generations", ())]
        lists = {"layers": layers, "reconstructions": reconstructions, "blocks": blocks, "generations": generations}
        lists |= {"mixtures": mixtures}
        return cls(**{**value, **lists})

    @classmethod
    def read(cls, folder: Path) -> PruneReport:
        """The report of a pruned folder.

        Raises:
            InputError: it is missing, damaged, or newer than this version of llmprune.
        """
        hint = "name a folder that llmprune wrote, or say what it holds: --sparsity"
        with reading(f"{folder / FILE} is no report of llmprune", hint):
            check_inside(folder / FILE, folder)
            with about(folder / FILE):
                value = upgraded(read_json(folder / FILE))
            if wrong := fault(value):
                raise ValueError(wrong)
            report = cls.from_json(value)
            Recipe.from_report(report.recipe).describe()
            if any(split_name(layer.name)[0] > MOST_BLOCKS for layer in report.layers):
                raise ValueError(f"it names more than {MOST_BLOCKS:,} blocks")
            return report

    @property
    def mean_error(self) -> float:
        """Mean relative output error of the pruned layers; without such, of the mixtures that lost experts."""
        errors = [part.error for part in self.layers or self.mixtures]
        return sum(errors) / max(len(errors), 1)

    @property
    def weights(self) -> int:
        """Number of weights in the pruned layers, before any removal."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def pruned_ratio(self) -> float:
        """Ratio of the pruned weights to all weights of the pruned layers."""
        return sum(layer.pruned for layer in self.layers) / max(self.weights, 1)

    def _repr_html_(self) -> str:
        """A table for notebooks: the main figures, removals and warnings."""
        rows = {"sparsity": self.sparsity["meaning"], "method": words.recipe_text(self.recipe)}
        rows |= {f"removed {number}": text for number, text in enumerate(self.sparsity["removed"], 1)}
        if text := words.grid_text(self.quantization):
            rows["quantised"] = text
        if self.sparsity["removed"]:
            rows["parameters"] = words.parameters_text(self.model)
        for key in ("dense", "pruned") if self.evaluation else ():
            rows[f"perplexity, {key}"] = words.perplexity_text(self.evaluation[key])  # type: ignore[index]
        if name := words.error_name(self):
            rows[name] = words.error_text(self)
        rows["time"] = words.duration(self.seconds.get("total", 0))
        rows |= {f"distilled: {key}": text for key, text in words.distillation_rows(self.distillation)}
        rows |= {f"warning {number}": text for number, text in enumerate(self.warnings, 1)}
        rows["saved to"] = self.out
        cells = (f"<tr><th>{words.escape(key)}</th><td>{words.escape(value)}</td></tr>" for key, value in rows.items())
        return f"<table>{''.join(cells)}</table>"
