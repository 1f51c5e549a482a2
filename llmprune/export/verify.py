"""Verification of the sparsity pattern of a written folder, from its files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.errors import InputError, printable
from llmprune.export.verify_grid import off_grid
from llmprune.model.blocks import LayerRef
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.quantization_section import config_section, wrong_section
from llmprune.model.selection import make_plan, select
from llmprune.model.skeleton import Skeleton
from llmprune.model.slices import find_slices
from llmprune.progress import Progress
from llmprune.pruning.grid import Grid, parse_grid
from llmprune.pruning.pattern import Scope, SparsityPattern, parse_pattern
from llmprune.pruning.sparsity import Sparsity, parse_sparsity
from llmprune.reporting.report import PruneReport
from llmprune.runtime.foreign import read_json, user_path
from llmprune.sources.demo import default_cache
from llmprune.sources.models import open_source


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """The zeros of one layer as stored.

    Args:
        name: module name.
        weights: number of weights.
        zeros: number of exact zeros.
        extra_zeros: zeros beyond the pattern's count: kept weights that are zero.
        violations: number of missing zeros.
    """

    name: str
    weights: int
    zeros: int
    extra_zeros: int
    violations: int


def check_layers(
    checkpoint: Checkpoint,
    layers: Iterable[tuple[LayerRef, SparsityPattern]],
    step: Callable[[], None] = lambda: None,
) -> list[LayerCheck]:
    """The zeros of every layer, checked against its pattern.

    Args:
        checkpoint: with the layers.
        layers: each with its pattern.
        step: called after every layer.
    """
    checks = []
    held: dict[str, Tensor] = {}
    for ref, pattern in layers:
        found = pattern.check(_expert_weight(checkpoint, ref, held) if ref.expert else _weight(checkpoint, ref))
        checks.append(LayerCheck(ref.name, found.weights, found.zeros, found.extra_zeros, found.violations))
        step()
    return checks


def _weight(checkpoint: Checkpoint, ref: LayerRef) -> Tensor:
    return ref.weight_in(checkpoint[ref.parameter].contiguous())


def _expert_weight(checkpoint: Checkpoint, ref: LayerRef, held: dict[str, Tensor]) -> Tensor:
    """The weight of an expert, `(out, in)`: read alone if that is possible, else from what is `held` of its block."""
    assert ref.expert is not None
    slices, count = find_slices(checkpoint, ref.parameter), ref.expert.layout.count
    if slices is not None and len(slices.shape) == 3 and slices.shape[0] == count:
        found = slices.read(ref.expert.index)
        return found.T if ref.transposed else found
    if ref.parameter not in held:
        owner = ref.parameter.rpartition(".")[0]
        for name in [name for name in held if not name.startswith(f"{owner}.")]:
            del held[name]
        held[ref.parameter] = checkpoint[ref.parameter].contiguous()
    return ref.weight_in(held[ref.parameter])


def patterns_of(report: PruneReport, scope: Scope | None = None) -> dict[str, SparsityPattern]:
    """The pattern of every pruned layer, by module name; in the report's scope, or another one."""
    scope = scope or report.sparsity["scope"]
    return {layer.name: parse_pattern(layer.pattern, scope) for layer in report.layers if layer.pattern}


@dataclass(frozen=True, slots=True)
class FolderCheck:
    """The result of `llmprune verify`."""

    folder: str
    pattern: Sparsity
    layers: list[LayerCheck]
    sizes: dict[str, tuple[int, Any]] = field(default_factory=dict)
    nonuniform: bool = False
    grid: str = ""
    on_grid: int = 0
    wrong_grids: list[str] = field(default_factory=list)
    wrong_config: list[str] = field(default_factory=list)

    @property
    def violations(self) -> int:
        """Number of missing zeros in all layers, of settings unlike the report's, and of layers off the grid."""
        others = (self.wrong_sizes, self.wrong_grids, self.wrong_config)
        return sum(layer.violations for layer in self.layers) + sum(map(len, others))

    @property
    def wrong_sizes(self) -> list[str]:
        """Settings of the config that differ from the report."""
        return [f"{key} is {found}, not {wanted}" for key, (wanted, found) in self.sizes.items() if found != wanted]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        layers = [asdict(layer) for layer in self.layers]
        sizes = {key: found for key, (_, found) in self.sizes.items()}
        return {
            "folder": self.folder,
            "pattern": self.pattern.name,
            "violations": self.violations,
            "layers": layers,
            "sizes": sizes,
            "grid": self.grid,
            "off_grid": self.wrong_grids,
            "config": self.wrong_config,
        }

    def text(self) -> str:
        """A summary in a few lines."""
        lines = [f"{self.folder}: {self.pattern.describe(self.nonuniform)}"]
        if self.pattern.removals:
            sizes = ", ".join(f"{key} {found}" for key, (_, found) in self.sizes.items())
            lines.append(f"every tensor has the shape that the config gives{f' ({sizes})' if sizes else ''}")
            lines += [f"VIOLATED config: {wrong}" for wrong in self.wrong_sizes]
        if self.grid:
            lines.append(f"{self.on_grid - len(self.wrong_grids)} of {self.on_grid} layers hold codes of {self.grid}")
            lines += [f"VIOLATED {wrong}" for wrong in self.wrong_grids[:20]]
            lines += [f"VIOLATED config: {wrong}" for wrong in self.wrong_config]
        return "\n".join(map(printable, lines + (self._zeros() if self.pattern.pattern else [])))

    def _zeros(self) -> list[str]:
        weights = sum(layer.weights for layer in self.layers)
        zeros = sum(layer.zeros for layer in self.layers)
        extra = sum(layer.extra_zeros for layer in self.layers)
        bad = [layer for layer in self.layers if layer.violations]
        lines = [
            f"{len(self.layers)} layers, zeros {zeros:,} of {weights:,} weights ({zeros / max(weights, 1):.3%}), "
            f"{extra:,} of them beyond the pattern"
        ]
        lines += [f"VIOLATED {layer.name}: {layer.violations:,} zeros missing" for layer in bad[:20]]
        lines += [f"... and {len(bad) - 20} more layers"] if len(bad) > 20 else []
        return [*lines, f"{len(bad)} layers violate the pattern" if bad else "the pattern holds in every layer"]


@dataclass(frozen=True, slots=True)
class LayerSelection:
    """Layers of a folder, and the pattern that they should hold.

    Args:
        sparsity: the pattern; None for those of the folder's report.
        scope: of an unstructured pattern; None for that of the report, else `layer`.
        only, skip: patterns of layer names.
    """

    sparsity: str | None = None
    scope: Scope | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()


BY_REPORT = LayerSelection()
"""The layers and patterns of the folder's report."""


def verify_folder(folder: Path, selection: LayerSelection = BY_REPORT, trust_remote_code: bool = False) -> FolderCheck:
    """Check the pattern of a folder's layers, and the sizes in its config; arguments as of `open_pruned`."""
    skeleton, goal, layers = open_pruned(folder, selection, trust_remote_code)
    report = PruneReport.read(folder) if selection.sparsity is None else None
    sizes = report.sparsity.get("config", {}) if report else {}
    settings = skeleton.config.get_text_config().to_dict()
    found = {key: (wanted, settings.get(key)) for key, wanted in sizes.items()}
    nonuniform = len({pattern for _, pattern in layers}) > 1
    grids = grids_of(report, skeleton) if report else []
    return FolderCheck(
        folder=str(folder),
        pattern=goal,
        layers=check_layers(skeleton.checkpoint, layers),
        sizes=found,
        nonuniform=nonuniform,
        grid=report.quantization.get("grid", "") if report else "",
        on_grid=len(grids),
        wrong_grids=off_grid(user_path(folder), skeleton.checkpoint, grids),
        wrong_config=check_config(user_path(folder), skeleton, grids),
    )


def check_config(folder: Path, skeleton: Skeleton, grids: Sequence[tuple[LayerRef, Grid]]) -> list[str]:
    """What of the config's `quantization_config` does not belong to the layers on a grid, a line for each."""
    if not grids:
        return []
    names = [ref.name for ref, _ in grids]
    found = read_json(folder / "config.json").get("quantization_config", {})
    wanted = config_section(grids[0][1], skeleton, names)
    return wrong_section(found, wanted, names)


def grids_of(report: PruneReport, skeleton: Skeleton) -> list[tuple[LayerRef, Grid]]:
    """The layers of a written model that the report says to be on a grid, each with it."""
    grids = {layer.name: parse_grid(layer.grid) for layer in report.layers if layer.grid}
    if not grids:
        return []
    plan = make_plan(skeleton, None, names=tuple(grids))
    return [(ref, grids[ref.name]) for ref in plan.layers]


def open_pruned(
    folder: Path, selection: LayerSelection = BY_REPORT, trust_remote_code: bool = False
) -> tuple[Skeleton, Sparsity, list[tuple[LayerRef, SparsityPattern]]]:
    """The model of a folder, its sparsity, and its pruned layers, each with the pattern that it should hold.

    Args:
        folder: a model folder.
        selection: of its layers.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: no model folder, or neither a report nor a pattern.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}", "name a model folder")
    sparsity, scope, only, skip = selection.sparsity, selection.scope, selection.only, selection.skip
    names: tuple[str, ...] | None = None
    patterns: dict[str, SparsityPattern] = {}
    if sparsity is None:
        report = PruneReport.read(folder)
        sparsity, scope = report.sparsity["pattern"], scope or report.sparsity["scope"]
        patterns = patterns_of(report, scope)
        known = [layer.name for layer in report.layers if layer.name in patterns or not patterns]
        names = tuple(name for name in known if not select(name, only, skip))
        # Where nothing but experts was removed, no layer was pruned on its own.
        if not names and (known or only or skip or parse_sparsity(sparsity).pattern is not None):
            raise InputError(
                f"the report names {len(known)} layers, and none is left to check", "loosen --only and --skip"
            )
        only = skip = ()
    goal = parse_sparsity(sparsity, scope or "layer")
    source = open_source(
        str(folder), revision=None, cache=default_cache(), trust_remote_code=trust_remote_code, progress=Progress()
    )
    # Every shape is checked against the config when the skeleton is made.
    skeleton = Skeleton(source.config, source.weights(source.dtype), trust_remote_code=trust_remote_code)
    if goal.pattern is None:
        return skeleton, goal, []
    plan = make_plan(skeleton, goal.pattern, only, skip, names)
    return skeleton, goal, [(ref, patterns.get(ref.name, goal.pattern)) for ref in plan.layers]
