"""What is done to every layer and block: the settings of one run, and the three efforts that set them for you."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Targets = Literal["pruned", "dense"]
Allocate = Literal["uniform", "error", "owl"]
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The stages a model goes through; every field is a flag of the command line.

    Args:
        method: a name of the METHODS table; '' where no pattern of weights is asked for.
        targets: what a layer should give: `pruned`, the dense layer's output on the pruned model's inputs; `dense`, its
            output in the dense model, as far as the calibration data support it.
        permute: whether input channels of an N:M layer are reordered where that can be folded into the layers before.
        steps: in how many nested steps the sparsity is reached, the weights fitted anew in between.
        ridge: how strongly weights are pulled to their targets, as a share of every input's own mean square.
        refit: whether the weights are fitted once more, exactly, on the mask that was found.
        reconstruct: in how many epochs a pruned block learns to give the dense block's output.
        self_calibration: how many windows the dense model generates and adds to the calibration text, per window of it.
        allocate: how the sparsity is shared out among the blocks: alike, or less where it hurts more.
        criterion: by which channels or heads go, a name of the CRITERIA table; '' where none do.
        compensate: whether what is left of a layer makes up, by least squares, for the inputs that went.
    """

    method: str
    targets: Targets = "pruned"
    permute: bool = False
    steps: int = 1
    ridge: float = 0.0
    refit: bool = False
    reconstruct: int = 0
    self_calibration: float = 0.0
    allocate: Allocate = "uniform"
    criterion: str = ""
    compensate: bool = True

    @classmethod
    def from_report(cls, settings: Mapping[str, Any]) -> Recipe:
        """The recipe that a report records beside its effort."""
        return cls(**{key: value for key, value in settings.items() if key != "effort"})

    @property
    def label(self) -> str:
        """The names of criterion and method."""
        return "+".join(dict.fromkeys(filter(None, (self.criterion, self.method))))

    @property
    def dense_stream(self) -> bool:
        """Whether the dense model's activations are needed."""
        return self.targets == "dense" or self.reconstruct > 0

    def self_calibration_windows(self, windows: int) -> int:
        """How many windows the dense model adds to so many of the text; at least one, if it writes at all."""
        return max(round(self.self_calibration * windows), 1) if self.self_calibration else 0

    def describe(self) -> str:
        """The stages in a few words."""
        stages = [self.label]
        if self.criterion:
            stages.append("reconstruction" if self.compensate else "no reconstruction")
        if self.targets == "dense":
            stages.append("dense targets")
        if self.permute:
            stages.append("permuted channels")
        if self.steps > 1:
            stages.append(f"{self.steps} steps")
        if self.ridge:
            stages.append(f"ridge {self.ridge:g}")
        if self.refit:
            stages.append("refit")
        if self.reconstruct:
            stages.append(f"{self.reconstruct} epoch{'s' if self.reconstruct > 1 else ''} of refinement")
        if self.self_calibration:
            stages.append(f"own text x{self.self_calibration:g}")
        if self.allocate != "uniform":
            stages.append(f"shares by {self.allocate}")
        return " + ".join(stages)


EFFORTS = {
    "fast": Recipe("sparsegpt"),
    "balanced": Recipe("admm", targets="dense", permute=True, ridge=0.3),
    "best": Recipe("admm", targets="dense", permute=True, ridge=0.3, reconstruct=2, self_calibration=3.0),
}
REMOVALS = {
    "fast": Recipe("", criterion="wanda"),
    "balanced": Recipe("", targets="dense", criterion="wanda"),
    "best": Recipe("", targets="dense", criterion="wanda", reconstruct=4),
}
"""What the efforts stand for where channels or heads are removed and no weights after that."""
DEFAULT_EFFORT = "balanced"


def make_recipe(method: str, effort: str, flags: Mapping[str, Any], criterion: str | None = None) -> Recipe:
    """The recipe that the user asked for.

    Args:
        method: a name of the METHODS table, alone unless flags add to it, or `auto` for what `effort` stands for; '' if
            only channels or heads go.
        effort: a name of EFFORTS.
        flags: fields set by the user; None where nothing was said.
        criterion: a name of the CRITERIA table, or `auto`; None if no channels or heads go.
    """
    base = EFFORTS[effort] if method == AUTO else Recipe(method)
    if criterion is not None:
        removal = REMOVALS[effort] if criterion == AUTO else Recipe("", criterion=criterion)
        base = replace(base, criterion=removal.criterion) if method else removal
        base = replace(base, compensate=flags.get("refit") is not False)
    return replace(base, **{key: value for key, value in flags.items() if value is not None})
