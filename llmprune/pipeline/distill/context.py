"""The context of a distillation: a checked job, and what follows from it."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from llmprune.distill_job import DistillJob
from llmprune.model.skeleton import Skeleton
from llmprune.pipeline.context import LIBRARIES, Data
from llmprune.pipeline.output import workdir_of
from llmprune.reporting.report import PruneReport
from llmprune.runtime.process_group import ProcessGroup
from llmprune.sources.models import Source
from llmprune.sources.tokens import TokenBatch

LEARNER_BYTES = 16
"""Of a trained parameter: value, gradient and two moments, in float32."""


@dataclass(frozen=True, slots=True)
class DistillContext:
    """A checked distillation: all that it needs.

    Args:
        job: what the user asked for.
        report: of the pruned folder.
        folder: the pruned folder.
        source: the teacher's folder and config.
        student: the pruned model without weights.
        teacher: the dense model without weights.
        data: the tokens; `calibration` holds the windows to train on, without those that the teacher generates.
        held_out: windows that are not trained on.
        frozen: names of the student's parameters that are not trained.
        out: the folder to be made.
        group: the processes.
        weights: hashes of the weights of both models, by what they are.
    """

    job: DistillJob
    report: PruneReport
    folder: Path
    source: Source
    student: Skeleton
    teacher: Skeleton
    data: Data
    held_out: TokenBatch
    frozen: frozenset[str]
    out: Path
    group: ProcessGroup
    weights: dict[str, str]

    @property
    def workdir(self) -> Path:
        """The working directory."""
        return workdir_of(self.out)

    @property
    def unfinished(self) -> Path:
        """The folder to be made, while it is not complete."""
        return self.workdir / "model"

    @property
    def checkpoints(self) -> Path:
        """The folder of the trainer's checkpoints."""
        return self.workdir / "trainer"

    @property
    def device(self) -> torch.device:
        """The device that both models run on."""
        return self.teacher.device

    @property
    def windows(self) -> int:
        """Number of windows to train on, generated ones among them."""
        return len(self.data.calibration.tokens) + self.generated_windows

    @property
    def generated_windows(self) -> int:
        """Number of windows that the teacher generates."""
        length = self.data.calibration.tokens.shape[1]
        return generated_windows(self.job, length)

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.job.epochs * (self.windows // self.job.batch_size)

    @property
    def interval(self) -> int:
        """Number of steps between two measurements of the held-out divergence."""
        return math.ceil(self.steps / self.job.evaluations)

    @property
    def top_k(self) -> int:
        """Number of the teacher's probabilities that are kept; 0 where it runs again, which is cheaper for one pass."""
        return self.job.top_k if self.job.epochs > 1 else 0

    @property
    def precision(self) -> torch.dtype:
        """The dtype of matrix products."""
        exact = self.device.type == "cpu" or not torch.cuda.is_bf16_supported()
        name = self.job.precision or ("float32" if exact else "bfloat16")
        return torch.bfloat16 if name == "bfloat16" else torch.float32

    @property
    def at_once(self) -> int:
        """Number of windows that pass through the models together in one process."""
        most = self.job.batch_size // self.group.world_size
        wanted = self.job.at_once or (2 if self.device.type == "cpu" else 8)
        return max(size for size in range(1, most + 1) if most % size == 0 and size <= wanted)

    @property
    def versions(self) -> dict[str, str]:
        """Of all libraries that the result depends on."""
        return {name: version(name) for name in (*LIBRARIES, "accelerate")} | {"python": platform.python_version()}


def text_windows(job: DistillJob, length: int) -> int:
    """Number of windows of the text to train on."""
    return job.tokens // length - generated_windows(job, length)


def generated_windows(job: DistillJob, length: int) -> int:
    """Number of windows that the teacher generates."""
    return round(job.generated * (job.tokens // length))
