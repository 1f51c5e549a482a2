"""Selection of the layers to prune, from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from llmprune.errors import InputError
from llmprune.model.blocks import LayerRef, Skipped, expert_counts, find_layers, find_other_weights
from llmprune.model.expert_probe import probe_experts
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.pattern import SparsityPattern

REGEX = "re:"
NOTHING_TO_LOSE = "no channels, heads or experts to lose"


@dataclass(frozen=True, slots=True)
class Plan:
    """The layers to prune, and sizes of the model.

    Args:
        layers: the layers to prune.
        skipped: block weights that are kept dense, and why.
        block_parameters: number of parameters in all blocks, shared ones once.
        parameters: number of parameters of the model, tied ones once.
        out_bytes: size of the folder to be written.
        notes: on patterns of names that change nothing.
        removed: layers that are removed as a whole, with their experts.
    """

    layers: tuple[LayerRef, ...]
    skipped: tuple[Skipped, ...]
    block_parameters: int
    parameters: int
    out_bytes: int
    notes: tuple[str, ...] = ()
    removed: tuple[LayerRef, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """Full names of the layers to prune."""
        return frozenset(layer.name for layer in self.layers)

    @property
    def covered(self) -> int:
        """Number of weights in the layers to prune, or to remove."""
        return sum(layer.weights for layer in (*self.layers, *self.removed))

    @property
    def coverage(self) -> float:
        """Ratio of the weights in layers to prune to all block parameters."""
        return self.covered / max(self.block_parameters, 1)

    def without(self, dense: Mapping[str, str]) -> Plan:
        """The plan with some of the layers kept dense, by full name, and why."""
        skipped = tuple(
            Skipped(layer.name, layer.weights, dense[layer.name]) for layer in self.layers if layer.name in dense
        )
        kept = tuple(layer for layer in self.layers if layer.name not in dense)
        return replace(self, layers=kept, skipped=self.skipped + skipped)

    def smaller(self, changed: frozenset[str] | None, saved: int, why: str = NOTHING_TO_LOSE) -> Plan:
        """The plan of a run that removes something and prunes nothing else.

        Args:
            changed: full names of the layers that get smaller or are fitted, the only ones to keep in the plan; None
                for all.
            saved: bytes that the model loses.
            why: the others stay as they are.
        """
        left = [] if changed is None else [layer.name for layer in self.layers if layer.name not in changed]
        return replace(self.without(dict.fromkeys(left, why)), out_bytes=self.out_bytes - saved)

    def within(self, skeleton: Skeleton, kept: Sequence[int]) -> Plan:
        """The plan of a model that keeps some of its blocks.

        Args:
            skeleton: the model.
            kept: numbers of the blocks that stay.
        """
        blocks = tuple(f"{skeleton.block_name(index)}." for index in kept)
        parameters = sum(parameter.numel() for index in kept for parameter in skeleton.blocks[index].parameters())

        def stays(name: str) -> bool:
            return name.startswith(blocks)

        return replace(
            self,
            layers=tuple(layer for layer in self.layers if stays(layer.name)),
            skipped=tuple(item for item in self.skipped if stays(item.name)),
            removed=tuple(layer for layer in self.removed if stays(layer.name)),
            block_parameters=parameters,
        )

    def resized(self, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
        """The plan of a model in which some parameters with the matrices of experts are smaller.

        Args:
            shapes: the new ones, `(experts, ...)`, by full name.
        """
        layers, removed = [], list(self.removed)
        for layer in self.layers:
            place, shape = layer.expert, shapes.get(layer.parameter)
            if place is None or shape is None:
                layers.append(layer)
            elif place.index < shape[0]:
                rows, width = shape[:0:-1] if layer.transposed else shape[1:]
                layout = replace(place.layout, count=shape[0], shape=(rows, width))
                layers.append(replace(layer, expert=replace(place, layout=layout)))
            else:
                removed.append(layer)
        return replace(self, layers=tuple(layers), removed=tuple(removed))

    def skipped_by_reason(self) -> dict[str, int]:
        """Number of weights that are kept dense, by reason."""
        total: dict[str, int] = {}
        for item in self.skipped:
            total[item.reason] = total.get(item.reason, 0) + item.weights
        return total


def matches(name: str, pattern: str) -> bool:
    """Whether the name of a layer matches a pattern.

    Args:
        name: such as `model.layers.0.mlp.down_proj`.
        pattern: a glob over the whole name; a plain name, which is the layer's last part (`down_proj`,
            `mlp.down_proj`); or `re:` and a regular expression, which begins where the name does.

    Raises:
        InputError: it is no regular expression.
    """
    if pattern.startswith(REGEX):
        try:
            return re.match(pattern.removeprefix(REGEX), name) is not None
        except re.error as error:
            raise InputError(
                f"{pattern!r} is no regular expression: {error}", "behind re: stands one, as of Python's re"
            ) from error
    if any(letter in pattern for letter in "*?["):
        return fnmatchcase(name, pattern)
    return f".{name}".endswith(f".{pattern}")


def select(name: str, only: Sequence[str], skip: Sequence[str]) -> str:
    """Why the patterns of names exclude the layer `name`, or ''."""
    if only and not any(matches(name, pattern) for pattern in only):
        return "not in --only"
    return "--skip" if any(matches(name, pattern) for pattern in skip) else ""


def make_plan(
    skeleton: Skeleton,
    pattern: SparsityPattern | None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    names: Collection[str] | None = None,
) -> Plan:
    """Select the layers to prune, and check that the pattern (if there is one) divides every one.

    Args:
        skeleton: the model.
        pattern: of the weights.
        only, skip: patterns of names, see `matches`.
        names: of the layers, exactly; None for all.

    Raises:
        InputError: a name that there is not, a width that the pattern does not divide, nothing left to prune.
    """
    probe_experts(skeleton)
    found = [
        layer
        for index, block in enumerate(skeleton.blocks)
        for layer in find_layers(block, skeleton.block_name(index), skeleton.config)
    ]
    notes = _check_patterns(skeleton, found, only, skip)
    if names is not None:
        found = _named(found, names)
    layers: list[LayerRef] = []
    skipped: list[Skipped] = []
    tied = skeleton.model.all_tied_weights_keys
    for layer in found:
        if layer.parameter in tied:
            continue
        reason = layer.skip or select(layer.name, only, skip)
        if not reason:
            reason = _storage_obstacle(skeleton, layer.parameter)
        if reason:
            skipped.append(Skipped(layer.name, layer.weights, reason))
        elif pattern is not None and (problem := pattern.mismatch(*layer.shape)):
            raise InputError(
                f"{pattern.name} does not fit layer {layer.name!r}: {problem}",
                "choose another pattern, or leave such layers dense with --skip GLOB",
            )
        else:
            layers.append(layer)
    experts = expert_counts(skeleton.config)
    for index, block in enumerate(skeleton.blocks):
        others = find_other_weights(block, skeleton.block_name(index), experts)
        skipped += [other for other in others if other.name not in tied]
    if not layers:
        raise InputError(_nothing_left(skeleton, found, skipped), "loosen --only and --skip")
    parameters = skeleton.sizes()
    inside = [size for name, size in parameters.items() if name.startswith(f"{skeleton.block_path}.")]
    return Plan(
        tuple(layers), tuple(skipped), sum(inside), sum(parameters.values()), skeleton.checkpoint.out_bytes(), notes
    )


def _nothing_left(skeleton: Skeleton, found: list[LayerRef], skipped: list[Skipped]) -> str:
    """Why none of the layers of a model is to be pruned."""
    dense = {item.name: item.reason for item in skipped}
    reasons = sorted({dense.get(layer.name, "tied to another part of the model") for layer in found})
    text = f"there is no layer left to prune in {type(skeleton.model).__name__}"
    return f"{text}: all {len(found)} are {', '.join(reasons)}" if reasons else text


def _storage_obstacle(skeleton: Skeleton, weight: str) -> str:
    """Why new values of a parameter cannot be written, or ''."""
    if not skeleton.checkpoint.writable(weight):
        return "stored in another form on disk"
    return "shared between blocks" if skeleton.checkpoint.shared(weight) else ""


def _named(layers: list[LayerRef], names: Collection[str]) -> list[LayerRef]:
    wanted = set(names)
    found = [layer for layer in layers if layer.name in wanted]
    if missing := sorted(wanted - {layer.name for layer in found}):
        raise InputError(f"none of {len(layers)} layers is called {missing[0]!r}", _example(layers))
    return found


def _check_patterns(
    skeleton: Skeleton, layers: list[LayerRef], only: Sequence[str], skip: Sequence[str]
) -> tuple[str, ...]:
    """Refuse patterns that match nothing; notes on those of `skip` that match only what is dense anyway."""
    notes = []
    for flag, patterns in (("--only", only), ("--skip", skip)):
        for pattern in patterns:
            if any(matches(layer.name, pattern) for layer in layers):
                continue
            dense = next((name for name, _ in skeleton.model.named_modules() if name and matches(name, pattern)), "")
            if not dense or flag == "--only":
                raise InputError(f"{flag} {pattern!r} matches none of {len(layers)} layers", _example(layers))
            notes.append(f"--skip {pattern!r} changes nothing: {dense!r} is no linear layer of a block and stays dense")
    return tuple(notes)


def _example(layers: list[LayerRef]) -> str:
    return f"a layer is called {layers[0].name if layers else 'none'!r}; only linear layers of the blocks are pruned"
