"""A checked job, and what follows from it."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune.job import Job
from llmprune.model.selection import Plan
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.layer_solver import Solver
from llmprune.pruning.parallel import RowSharding
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.recipe import Recipe
from llmprune.pruning.sparsity import Sparsity
from llmprune.pruning.structured_solver import Remover
from llmprune.runtime.process_group import SINGLE, ProcessGroup
from llmprune.sources.models import Source
from llmprune.sources.tokens import TokenBatch
from llmprune.structure.cut import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LIBRARIES = ("llmprune", "torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked job: all that the run needs; `own` is what the dense model writes, once it has.

    What had to be left out is said by `left_out`.
    """

    job: Job
    source: Source
    goal: Sparsity
    recipe: Recipe
    solver: Solver | None
    remover: Remover | None
    structure: Structure | None
    skeleton: Skeleton
    plan: Plan
    calibration: TokenBatch
    evaluation: TokenBatch | None
    overlap: float
    out: Path
    group: ProcessGroup = SINGLE
    sharding: RowSharding = field(default_factory=RowSharding)
    own: TokenBatch | None = None
    left_out: str = ""

    @property
    def pattern(self) -> SparsityPattern | None:
        """Of the weights; None where only channels or heads go."""
        return self.goal.pattern

    @property
    def options(self) -> dict[str, float]:
        """The options of criterion and method."""
        used = (self.remover.criterion if self.remover else None, self.solver.method if self.solver else None)
        return {key: value for one in used if one is not None for key, value in asdict(one).items()}  # type: ignore[call-overload]

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the model that is made."""
        return self.source.config if self.structure is None else self.structure.config

    @property
    def chosen(self) -> frozenset[str]:
        """Full names of the layers that are solved."""
        cuts = frozenset(self.structure.by_name) if self.structure else frozenset()
        return cuts if self.pattern is None else cuts | self.plan.names

    @property
    def tokens(self) -> Tensor:
        """The calibration windows, the model's own among them, `(samples, length)`."""
        if self.own is None:
            return self.calibration.tokens
        both = torch.cat([self.calibration.tokens, self.own.tokens])
        # What is held out of them is of both kinds.
        return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(self.job.seed))]

    @property
    def own_windows(self) -> int:
        """How many the dense model writes."""
        return self.recipe.own_windows(len(self.calibration.tokens))

    @property
    def shape(self) -> tuple[int, int]:
        """Of all calibration tokens, also of those that are still to be written: windows, length."""
        samples, length = self.calibration.tokens.shape
        return samples + self.own_windows, length

    @property
    def partial(self) -> Path:
        """Where the work in progress lives: beside `out`, so that the final rename is atomic."""
        return self.out.with_name(f".{self.out.name}.partial")

    @property
    def unfinished(self) -> Path:
        """The model so far."""
        return self.partial / "model"

    @property
    def resting_bytes(self) -> int:
        """Size of the hidden states that enter a block and leave it, in all streams."""
        hidden = self.source.config.get_text_config().hidden_size
        element = self.skeleton.compute.itemsize * (2 if self.recipe.twin else 1)
        return 2 * math.prod(self.shape) * int(hidden) * element

    @property
    def versions(self) -> dict[str, str]:
        """Of all that the result depends on."""
        return {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
