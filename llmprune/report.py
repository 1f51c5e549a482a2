"""What a run did, as data: `prune_report.json`. Every key is documented in docs/report.md."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmprune.errors import InputError

FILE = "prune_report.json"


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One pruned layer; see docs/report.md."""

    name: str
    shape: tuple[int, int]
    pattern: str
    pruned: int
    kept_zeros: int
    error: float
    status: str
    tokens: int
    stats: dict[str, float]


@dataclass(frozen=True, slots=True)
class Refinement:
    """What a block gained by local refinement; see docs/report.md."""

    block: str
    before: float
    after: float


@dataclass(slots=True)
class PruneReport:
    """One run; see docs/report.md."""

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
    layers: list[LayerReport] = field(default_factory=list)
    refinements: list[Refinement] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    size: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    peak_memory: int = 0
    baseline_memory: int = 0
    out: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PruneReport:
        """The inverse of `to_json`."""
        layers = [LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in value["layers"]]
        refinements = [Refinement(**refinement) for refinement in value["refinements"]]
        return cls(**{**value, "layers": layers, "refinements": refinements})

    @classmethod
    def read(cls, folder: Path) -> PruneReport:
        """The report of a pruned folder.

        Raises:
            InputError: it is missing or damaged.
        """
        try:
            return cls.from_json(json.loads((folder / FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder / FILE} is no report of llmprune: {error}", "say what to check: --sparsity"
            ) from error

    @property
    def mean_error(self) -> float:
        """Mean relative output error of the pruned layers (fraction)."""
        return sum(layer.error for layer in self.layers) / max(len(self.layers), 1)
