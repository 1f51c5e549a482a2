"""The context of a run: a checked job, and what follows from it."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.job import Job
from llmprune.model.selection import Plan
from llmprune.model.skeleton import Skeleton
from llmprune.pipeline.output import workdir_of
from llmprune.pruning.blocks import BlockCriterion
from llmprune.pruning.experts import ExpertCriterion
from llmprune.pruning.grid import Grid
from llmprune.pruning.layer_solver import LayerSolver
from llmprune.pruning.parallel import RowSharding
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.recipe import Recipe
from llmprune.pruning.sparsity import Sparsity
from llmprune.pruning.structured_solver import StructuredSolver
from llmprune.reporting.report import PruneReport
from llmprune.runtime.process_group import ProcessGroup
from llmprune.sources.models import DEQUANTIZED, Source
from llmprune.sources.tokens import TokenBatch
from llmprune.structure.cut import Structure
from llmprune.structure.fewer_blocks import renumbering

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LIBRARIES = ("llmprune", "torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class Procedure:
    """Sparsity, recipe and solver of a run.

    Args:
        sparsity: what is removed and pruned.
        recipe: the stages, defaults applied.
        solver: solves the groups of layers.
        sharding: shares the solves among processes.
        experts: chooses the experts to be removed; None where none are.
        grid: the values that kept weights may have; None for floating point.
        blocks: chooses the blocks to be removed; None where none are.
    """

    sparsity: Sparsity
    recipe: Recipe
    solver: LayerSolver | StructuredSolver
    sharding: RowSharding = field(default_factory=RowSharding)
    experts: ExpertCriterion | None = None
    grid: Grid | None = None
    blocks: BlockCriterion | None = None


@dataclass(frozen=True, slots=True)
class Data:
    """The tokens of a run.

    Args:
        calibration: windows of the calibration text.
        evaluation: windows of the evaluation text; None if perplexity is not measured.
        overlap: fraction of the evaluation text that also stands in the calibration text.
    """

    calibration: TokenBatch
    evaluation: TokenBatch | None
    overlap: float

    @property
    def warning(self) -> str:
        """That only the windows of one kind begin with BOS, or ''."""
        if self.evaluation is None or self.calibration.bos_tokens == self.evaluation.bos_tokens:
            return ""
        names = [batch.provenance.source for batch in (self.calibration, self.evaluation)]
        with_bos, without = names if self.calibration.bos_tokens else reversed(names)
        return (
            f"windows of {with_bos} begin with BOS, those of {without} do not; a token file is taken as it is: make it "
            "again with the --bos of the run"
        )


@dataclass(frozen=True, slots=True)
class RunContext:
    """A checked job: all that the run needs.

    Args:
        job: what the user asked for.
        source: the dense model's folder and config.
        procedure: how the sparsity is reached.
        skeleton: the dense model without weights.
        plan: the layers to be pruned.
        structure: the smaller model, where blocks, channels, heads or experts are removed; else without cuts.
        data: the tokens.
        out: the folder to be made.
        left_out: why self-generated text had to be left out, or ''.
        held: the report of the source, where that was pruned before and its weights are only quantised: its zeros stay.
        repairing: full names of the layers that are fitted anew because blocks behind them are removed.
    """

    job: Job
    source: Source
    procedure: Procedure
    skeleton: Skeleton
    plan: Plan
    structure: Structure
    data: Data
    out: Path
    left_out: str = ""
    held: PruneReport | None = None
    repairing: frozenset[str] = frozenset()

    @property
    def recipe(self) -> Recipe:
        """The stages of the run."""
        return self.procedure.recipe

    @property
    def sparsity(self) -> Sparsity:
        """The requested removals and pattern."""
        return self.procedure.sparsity

    @property
    def pattern(self) -> SparsityPattern | None:
        """Of the weights; None where whole parts are removed and nothing else."""
        return self.sparsity.pattern

    @property
    def grid(self) -> Grid | None:
        """Of the weights that are kept; None for floating point."""
        return self.procedure.grid

    @property
    def solver(self) -> LayerSolver | StructuredSolver:
        """Solves the groups of layers."""
        return self.procedure.solver

    @property
    def group(self) -> ProcessGroup:
        """The processes of the run."""
        return self.procedure.sharding.group

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the model that is made."""
        return self.structure.config

    @property
    def dequantized_dtype(self) -> str:
        """The dtype of weights that the source stores in fewer bits; '' where it stores them plain."""
        if self.source.quantization is None:
            return ""
        return self.job.dtype or str(DEQUANTIZED).removeprefix("torch.")

    @property
    def chosen(self) -> frozenset[str]:
        """Full names of the layers that are solved."""
        own = frozenset(self.structure.by_name) | self.repairing
        return own if self.pattern is None and self.grid is None else own | self.plan.names

    @property
    def removed_blocks(self) -> frozenset[int]:
        """Numbers of the blocks that are removed."""
        return frozenset(self.structure.removed_blocks(self.skeleton))

    @property
    def renumbered(self) -> Callable[[str], str]:
        """The name that something in the dense model, or in its files, has in the model that is made."""
        kept = self.structure.kept_blocks
        return str if kept is None else renumbering(self.skeleton, kept)

    @property
    def generated_windows(self) -> int:
        """Number of calibration windows that the dense model generates."""
        return self.recipe.self_calibration_windows(len(self.data.calibration.tokens))

    @property
    def shape(self) -> tuple[int, int]:
        """`(windows, length)` of all calibration tokens, self-generated ones among them."""
        samples, length = self.data.calibration.tokens.shape
        return samples + self.generated_windows, length

    @property
    def workdir(self) -> Path:
        """The working directory."""
        return workdir_of(self.out)

    @property
    def rank_workdir(self) -> Path:
        """The folder in which this process stores its hidden states."""
        return rank_folder(self.workdir, self.group.rank)

    @property
    def unfinished(self) -> Path:
        """The model so far."""
        return self.workdir / "model"

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states that enter a block and leave it, in all streams."""
        element = self.skeleton.compute.itemsize * (2 if self.recipe.dense_stream else 1)
        return 2 * math.prod(self.shape) * self.skeleton.width * element

    @property
    def versions(self) -> dict[str, str]:
        """Of all libraries that the result depends on."""
        return {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}


RANK = "rank-"


def rank_folder(workdir: Path, rank: int) -> Path:
    """The folder in which a process stores its hidden states."""
    return workdir / f"{RANK}{rank}" if rank else workdir
