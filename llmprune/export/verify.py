"""Does a written folder really hold the pattern? Only the files are believed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.blocks import LayerRef, select
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.selection import make_plan
from llmprune.model.skeleton import Skeleton
from llmprune.progress import Progress
from llmprune.pruning.pattern import Scope, SparsityPattern, parse_pattern
from llmprune.pruning.sparsity import Sparsity, parse_sparsity
from llmprune.reporting.report import PruneReport
from llmprune.sources.demo import default_cache
from llmprune.sources.models import open_source


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """What the files say of one layer.

    Args:
        name: module name.
        weights: number of weights.
        zeros: how many are exactly zero.
        extra_zeros: zeros beyond the pattern's count: kept weights that happen to be zero.
        violations: zeros that are missing.
    """

    name: str
    weights: int
    zeros: int
    extra_zeros: int
    violations: int


def check_layers(
    tensors: Mapping[str, Tensor],
    layers: Iterable[tuple[LayerRef, SparsityPattern]],
    step: Callable[[], None] = lambda: None,
) -> list[LayerCheck]:
    """Check the pattern of every layer.

    Args:
        tensors: parameters by module name.
        layers: with the pattern that each must hold.
        step: called after every layer.
    """
    checks = []
    for ref, pattern in layers:
        weight = tensors[f"{ref.name}.weight"]
        found = pattern.check(weight.T if ref.transposed else weight)
        checks.append(LayerCheck(ref.name, found.weights, found.zeros, found.extra_zeros, found.violations))
        step()
    return checks


def patterns_of(report: PruneReport, scope: Scope | None = None) -> dict[str, SparsityPattern]:
    """Every pruned layer's pattern, by module name; in the report's scope, or another one."""
    scope = scope or report.sparsity["scope"]
    return {layer.name: parse_pattern(layer.pattern, scope) for layer in report.layers if layer.pattern}


@dataclass(frozen=True, slots=True)
class FolderCheck:
    """What `llmprune verify` found."""

    folder: str
    pattern: Sparsity
    layers: list[LayerCheck]
    sizes: dict[str, tuple[int, Any]] = field(default_factory=dict)
    shared_out: bool = False

    @property
    def violations(self) -> int:
        """Zeros that are missing in all layers, and sizes that are not what the report says."""
        return sum(layer.violations for layer in self.layers) + len(self.wrong_sizes)

    @property
    def wrong_sizes(self) -> list[str]:
        """Settings of the config that differ from the report."""
        return [f"{key} is {found}, not {said}" for key, (said, found) in self.sizes.items() if found != said]

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
        }

    def text(self) -> str:
        """A few lines for people."""
        lines = [f"{self.folder}: {self.pattern.describe(self.shared_out)}"]
        if self.pattern.removals:
            sizes = ", ".join(f"{key} {found}" for key, (_, found) in self.sizes.items())
            lines.append(f"every tensor has the shape that the config says{f' ({sizes})' if sizes else ''}")
            lines += [f"VIOLATED config: {wrong}" for wrong in self.wrong_sizes]
        return "\n".join(lines + (self._zeros() if self.pattern.pattern else []))

    def _zeros(self) -> list[str]:
        weights = sum(layer.weights for layer in self.layers)
        zeros = sum(layer.zeros for layer in self.layers)
        extra = sum(layer.extra_zeros for layer in self.layers)
        bad = [layer for layer in self.layers if layer.violations]
        lines = [
            f"{len(self.layers)} layers, zeros {zeros:,} of {weights:,} weights ({zeros / weights:.3%}), "
            f"{extra:,} of them beyond the pattern"
        ]
        lines += [f"VIOLATED {layer.name}: {layer.violations:,} zeros missing" for layer in bad[:20]]
        lines += [f"... and {len(bad) - 20} more layers"] if len(bad) > 20 else []
        return [*lines, f"{len(bad)} layers violate the pattern" if bad else "the pattern holds in every layer"]


def verify_folder(
    folder: Path,
    sparsity: str | None,
    scope: Scope | None,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    trust_remote_code: bool = False,
) -> FolderCheck:
    """Check the pattern of a folder's layers, by its report or by what the user says; arguments as of `open_pruned`."""
    skeleton, goal, layers = open_pruned(folder, sparsity, scope, only, skip, trust_remote_code)
    sizes = PruneReport.read(folder).sparsity.get("config", {}) if sparsity is None else {}
    found = {key: (said, getattr(skeleton.config, key, None)) for key, said in sizes.items()}
    shared_out = len({pattern for _, pattern in layers}) > 1
    return FolderCheck(str(folder), goal, check_layers(skeleton.checkpoint, layers), found, shared_out)


def open_pruned(
    folder: Path,
    sparsity: str | None = None,
    scope: Scope | None = None,
    only: tuple[str, ...] = (),
    skip: tuple[str, ...] = (),
    trust_remote_code: bool = False,
) -> tuple[Skeleton, Sparsity, list[tuple[LayerRef, SparsityPattern]]]:
    """A model folder, what it should hold, and its pruned layers, each with the pattern that it should hold.

    Args:
        folder: a model folder.
        sparsity: the pattern; None for what the folder's report says.
        scope: of an unstructured pattern.
        only, skip: globs over layer names.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: no model folder, or neither a report nor a pattern.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}", "name a model folder")
    names: tuple[str, ...] = ()
    own: dict[str, SparsityPattern] = {}
    if sparsity is None:
        report = PruneReport.read(folder)
        sparsity, scope = report.sparsity["pattern"], scope or report.sparsity["scope"]
        own = patterns_of(report, scope)
        names = tuple(layer.name for layer in report.layers if layer.name in own or not own)
        only = tuple(name for name in names if not select(name, only, skip))
        if not only:
            raise InputError(
                f"the report names {len(names)} layers, and none is left to check", "loosen --only and --skip"
            )
    goal = parse_sparsity(sparsity, scope or "layer")
    source = open_source(
        str(folder), revision=None, cache=default_cache(), trust_remote_code=trust_remote_code, progress=Progress()
    )
    # Every shape is checked against the config when the skeleton is made.
    skeleton = Skeleton(source.config, SafetensorsFolder(folder), trust_remote_code=trust_remote_code)
    if goal.pattern is None:
        return skeleton, goal, []
    # A report names layers exactly; one that the model lacks is an error, as a glob that matches nothing is.
    plan = make_plan(skeleton, goal.pattern, only, () if names else skip)
    return skeleton, goal, [(ref, own.get(ref.name, goal.pattern)) for ref in plan.layers]
