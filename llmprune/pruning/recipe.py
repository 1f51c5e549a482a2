"""What is done to every layer and block: the settings of one run, and the three efforts that set them for you."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from llmprune.knobs import RATIO, REQUIRED, SWITCH, TEXT, choice, knob, knobs_of, optional, whole

Targets = Literal["pruned", "dense"]
Allocate = Literal["uniform", "error", "owl"]
AUTO = "auto"
GPTQ = "gptq"
"""What a recipe without a method is called: its weights are quantised, and none pruned."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to every layer and block."""

    method: str = knob(REQUIRED, "recipe", "method for weights; empty where no pattern is asked for", TEXT)
    targets: Targets = knob(
        "pruned",
        "recipe",
        "what a layer is fitted to: the dense layer's output on the pruned model's inputs (pruned), or its output in "
        "the dense model (dense)",
        choice(get_args(Targets), metavar="WHICH"),
        label="{} targets",
        guesses=("target",),
    )
    permute: bool = knob(
        False,
        "recipe",
        "permute input channels where the permutation folds into the layers before",
        SWITCH,
        applies_to="N:M",
        label="permuted channels",
        guesses=("permutation", "channel_permutation", "reorder"),
    )
    steps: int = knob(
        1,
        "recipe",
        "iterative pruning schedule: the sparsity is reached in K nested steps, the weights fitted in between",
        whole(metavar="K"),
        label="{} steps",
        guesses=("iterative_steps", "pruning_steps", "schedule"),
    )
    ridge: float = knob(
        0.0,
        "recipe",
        "diagonal-scaled ridge (Tikhonov) penalty on the distance to the targets, relative to every input's mean "
        "square",
        RATIO,
        label="ridge {:g}",
        guesses=("l2", "tikhonov", "lambda"),
    )
    shrinkage: bool = knob(
        False,
        "recipe",
        "statistics of an expert that few tokens are routed to are shrunk towards those of all tokens of its layer",
        SWITCH,
        applies_to="mixtures of experts",
        label="shrinkage",
        guesses=("shrink", "pool_experts"),
    )
    grid_passes: int = knob(
        0,
        "recipe",
        "quantisation: passes of least-squares scales and coordinate descent over the codes, behind the sweep with "
        "error feedback",
        whole(0, metavar="K"),
        applies_to="--quantize",
        label="{} grid passes",
        guesses=("quantize_passes", "descent", "grid_steps"),
    )
    refit: bool = knob(
        False,
        "recipe",
        "least-squares refit of the kept weights on the final mask; after removals unless --no-refit",
        SWITCH,
        label="refit",
        guesses=("least_squares", "update_weights"),
    )
    reconstruct: int = knob(
        0,
        "recipe",
        "block-wise reconstruction: epochs in which every pruned block is trained to give the dense block's output; "
        "the best on held-out windows is kept",
        whole(0, metavar="EPOCHS"),
        unit="epochs",
        label="block-wise reconstruction x{}",
        earlier=("refine",),
        guesses=("epochs", "finetune", "num_epochs", "block_reconstruction", "reconstruction"),
    )
    self_calibration: float = knob(
        0.0,
        "recipe",
        "self-calibration: windows that the dense model generates, per window of the calibration text, and that are "
        "added to it",
        RATIO,
        label="self-calibration x{:g}",
        earlier=("own",),
        guesses=("self_generated", "generate_calibration"),
    )
    allocate: Allocate = knob(
        "uniform",
        "recipe",
        "non-uniform layer-wise allocation: less sparsity in blocks with larger errors (error) or more outliers (owl)",
        choice(get_args(Allocate), metavar="RULE"),
        applies_to="unstructured",
        label="allocation by {}",
        guesses=("allocation", "layerwise", "sparsity_distribution", "owl=owl"),
    )
    criterion: str = knob("", "recipe", "criterion for channels and heads; empty where none are removed", TEXT)
    expert_criterion: str = knob("", "recipe", "criterion for whole experts; empty where none are removed", TEXT)
    block_criterion: str = knob("", "recipe", "criterion for whole blocks; empty where none are removed", TEXT)
    guard: bool = knob(
        True,
        "recipe",
        "super experts, whose outputs are far beyond the others' in a block with massive activations, are not removed",
        SWITCH,
        applies_to="experts",
        label="no guard",
        guesses=("super_experts", "protect"),
    )
    compensate: bool = knob(
        True,
        "recipe",
        "whether what is left compensates, by least squares, for what was removed",
        SWITCH,
        applies_to="blocks, channels, heads, experts",
        label="no compensation",
    )

    @classmethod
    def from_report(cls, settings: Mapping[str, Any]) -> Recipe:
        """The recipe that a report records beside its effort."""
        return cls(**{key: value for key, value in settings.items() if key != "effort"})

    @property
    def label(self) -> str:
        """The names of criteria and method; where there are none, weights are only quantised."""
        return "+".join(dict.fromkeys(filter(None, self.names))) or GPTQ

    @property
    def names(self) -> tuple[str, ...]:
        """The criteria of blocks, experts, and channels and heads, and the method; empty where there is none."""
        return self.block_criterion, self.expert_criterion, self.criterion, self.method

    @property
    def dense_stream(self) -> bool:
        """Whether the dense model's activations are needed."""
        return self.targets == "dense" or self.reconstruct > 0

    @property
    def whole_blocks(self) -> bool:
        """Whether blocks must be in memory as a whole, however large their experts."""
        return self.reconstruct > 0 or bool(self.expert_criterion)

    def self_calibration_windows(self, windows: int) -> int:
        """How many windows the dense model adds to so many of the text; at least one, if it writes at all."""
        return max(round(self.self_calibration * windows), 1) if self.self_calibration else 0

    def describe(self) -> str:
        """The method and every setting that is not the plain method's, in one phrase."""
        settings = [(each, getattr(self, each.name)) for each in knobs_of(Recipe) if each.label]
        return " + ".join(
            [self.label, *(each.label.format(value) for each, value in settings if value != each.default)]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The settings of a recipe that a user may set; None for those of the effort, or of a plain method."""

    targets: Targets | None = optional(Recipe, "targets")
    permute: bool | None = optional(Recipe, "permute")
    steps: int | None = optional(Recipe, "steps")
    ridge: float | None = optional(Recipe, "ridge")
    shrinkage: bool | None = optional(Recipe, "shrinkage")
    grid_passes: int | None = optional(Recipe, "grid_passes")
    refit: bool | None = optional(Recipe, "refit")
    reconstruct: int | None = optional(Recipe, "reconstruct")
    self_calibration: float | None = optional(Recipe, "self_calibration")
    allocate: Allocate | None = optional(Recipe, "allocate")
    guard: bool | None = optional(Recipe, "guard")


EFFORTS = {
    "fast": Recipe("sparsegpt", grid_passes=1),
    "balanced": Recipe("admm", targets="dense", permute=True, ridge=0.3, shrinkage=True, grid_passes=4),
    "best": Recipe(
        "admm",
        targets="dense",
        permute=True,
        ridge=0.3,
        shrinkage=True,
        grid_passes=4,
        reconstruct=2,
        self_calibration=3.0,
    ),
}
_REMOVAL = Recipe("", criterion="wanda", expert_criterion="wanda", block_criterion="repair", grid_passes=1)
STRUCTURED_EFFORTS = {
    "fast": _REMOVAL,
    "balanced": replace(_REMOVAL, targets="dense", grid_passes=4),
    "best": replace(_REMOVAL, targets="dense", grid_passes=4, reconstruct=4),
}
"""What the efforts stand for where blocks, channels, heads or experts are removed and no weights after that."""
CRITERION_FIELDS = ("criterion", "expert_criterion", "block_criterion")
DEFAULT_EFFORT = "balanced"


def make_recipe(
    method: str, effort: str, flags: Mapping[str, Any], criteria: Mapping[str, str] | None = None
) -> Recipe:
    """The recipe that the user asked for.

    Args:
        method: a name of the METHODS table, alone unless flags add to it, or `auto` for what `effort` stands for; '' if
            nothing but blocks, channels, heads or experts goes, or weights are quantised and none pruned.
        effort: a name of EFFORTS.
        flags: fields set by the user; None where nothing was said.
        criteria: by the fields of a recipe that name the criteria of what is removed, a name of the field's table, or
            `auto`.
    """
    base = EFFORTS[effort] if method == AUTO else Recipe(method)
    if not method and not criteria:
        base = replace(EFFORTS[effort], method="", permute=False)
    if criteria:
        usual = STRUCTURED_EFFORTS[effort]
        if not method:
            base = usual if AUTO in criteria.values() else Recipe("")
        named = {field: getattr(usual, field) if name == AUTO else name for field, name in criteria.items()}
        settings: dict[str, Any] = {**dict.fromkeys(CRITERION_FIELDS, ""), **named}
        base = replace(base, **settings, compensate=flags.get("refit") is not False)
    return replace(base, **{key: value for key, value in flags.items() if value is not None})
