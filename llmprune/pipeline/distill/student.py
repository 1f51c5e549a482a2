"""The pruned model as it is trained: whole in memory, in float32, its weights on a grid where the folder has one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from llmprune.errors import PruneError
from llmprune.export.verify import grids_of, patterns_of
from llmprune.model import compressed_tensors
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.selection import make_plan
from llmprune.model.skeleton import build_on_meta
from llmprune.pipeline.distill.context import DistillContext
from llmprune.pruning.grid import Grid
from llmprune.training.on_grid import OnGrid

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LATENT = "parametrizations.weight.original"
GAIN = "parametrizations.weight.0.gain"


@dataclass(frozen=True, slots=True)
class Student:
    """A model to be trained.

    Args:
        model: of transformers.
        grids: of weights on a grid, by the names of their parameters in the skeleton.
    """

    model: PreTrainedModel
    grids: dict[str, Grid]

    def trained_name(self, name: str) -> str:
        """The name of a parameter, which is another one where it is on a grid."""
        return f"{name.rpartition('.')[0]}.{LATENT}" if name in self.grids else name

    def tensors(self, run: DistillContext) -> Iterator[tuple[str, Tensor]]:
        """The trained tensors under their names on disk, in the types and form of the pruned folder.

        Raises:
            PruneError: one holds NaN or Inf.
        """
        checkpoint, values = run.student.checkpoint, {}
        for name in (each for each, _ in run.student.model.named_parameters() if each not in run.frozen):
            value = self.model.get_parameter(self.trained_name(name)).detach()
            if name in self.grids:
                yield from self._coded(run, name, value)
                continue
            values[name] = _finite(name, value.cpu().to(checkpoint.stored_dtype(name)))
        yield from checkpoint.export(list(values), values)

    def _coded(self, run: DistillContext, name: str, latent: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors on disk of a weight on a grid."""
        layer, grid = self.model.get_submodule(name.rpartition(".")[0]), self.grids[name]
        weight, scale = layer.parametrizations.weight[0].stored(latent)
        weight, scale = (_finite(name, value.cpu()).to(grid.scale_dtype) for value in (weight, scale))
        yield from compressed_tensors.written(disk_name(run, name), weight, scale, grid)


def _finite(name: str, value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise PruneError(f"{name!r} holds NaN or Inf after the training", "use a smaller --learning-rate")
    return value


def open_student(run: DistillContext) -> Student:
    """The student, its weights those of the pruned folder."""
    skeleton = run.student
    model = build_on_meta(skeleton.config, torch.float32, run.job.trust_remote_code, skeleton.checkpoint.folder.stored)
    # Tied parameters are filled once, and tied again.
    held = {name: skeleton.checkpoint[name].clone() for name in model.state_dict()}
    state = {name: value.float() if value.is_floating_point() else value for name, value in held.items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.to(run.device).requires_grad_(True)
    raw, grids = SafetensorsFolder(run.folder), {}
    for ref, grid in grids_of(run.report, skeleton):
        scale = raw[f"{disk_name(run, ref.parameter)}_scale"].to(run.device)
        grids[ref.parameter] = replace(grid, scale_dtype=scale.dtype)
        layer = model.get_submodule(ref.parameter.rpartition(".")[0])
        parametrize.register_parametrization(layer, "weight", OnGrid(scale.float(), scale.dtype, grid))
    student = Student(model, grids)
    for name in run.frozen:
        model.get_parameter(student.trained_name(name)).requires_grad_(False)
        if name in grids:
            model.get_parameter(f"{name.rpartition('.')[0]}.{GAIN}").requires_grad_(False)
    return student


def disk_name(run: DistillContext, parameter: str) -> str:
    """The name on disk of a weight on a grid, without what is added for its codes."""
    return run.student.checkpoint.origin(parameter).names[0].removesuffix("_packed")


def zero_parameters(run: DistillContext, student: Student) -> list[str]:
    """The names of the trained parameters that hold pruned layers."""
    patterns = patterns_of(run.report)
    if not patterns:
        return []
    plan = make_plan(run.student, None, names=tuple(patterns))
    return sorted({student.trained_name(layer.parameter) for layer in plan.layers if layer.parameter not in run.frozen})
