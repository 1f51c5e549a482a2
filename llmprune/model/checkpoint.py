"""The parameters of a model in a folder of safetensors, by module name.

Names on disk are not always the module's: a checkpoint of the base model lacks the prefix, old ones use legacy names,
experts may be fused on load. `Checkpoint` maps them with transformers' own rules; files are written with the names of
the source, so that whatever loaded the source loads the result.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.origin import Fewer, Origin
from llmprune.model.reader import SafetensorsFolder, too_large

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Revert = Callable[[Tensor], Iterator[tuple[str, Tensor]]]
LEAST = 1e-15
"""A layer whose largest weight is smaller cannot be pruned: solvers square weights in float32."""


def _few(source: Origin) -> Origin:
    """The first two tensors of every pattern."""
    seen: dict[str, int] = defaultdict(int)
    kept = []
    for at, pattern in enumerate(source.patterns):
        seen[pattern] += 1
        if seen[pattern] <= 2:
            kept.append(at)
    return source.only(kept)


class Checkpoint(Mapping[str, Tensor]):
    """The parameters of a model by module name, read lazily from a folder.

    Args:
        folder: the tensors on disk.
        model: on the meta device; gives names and shapes.
        dtype: of floating tensors in the result; None for the dtype of the source.

    Attributes:
        unused: names on disk that the model has no use for.
        sliceable: whether rules of conversion work expert by expert, by their identity, see `find_slices`.

    Raises:
        InputError: the checkpoint does not cover the model, or a shape differs.
    """

    def __init__(self, folder: SafetensorsFolder, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        self.folder = folder
        self.dtype = dtype
        self._model = model
        state = dict(model.state_dict(keep_vars=True))
        self._shapes: dict[str, torch.Size] = {name: tensor.shape for name, tensor in state.items()}
        self._sources: dict[str, Origin] = {}
        self._made: dict[Origin, list[str]] = defaultdict(list)
        self._inverses: dict[int, bool] = {}
        self.sliceable: dict[int, bool] = {}
        self.unused: list[str] = []
        self._map_names(state)
        self._alias_tied(state)
        self._check(state)
        self._users: dict[str, list[str]] = defaultdict(list)
        for name, source in self._sources.items():
            for disk in source.names:
                self._users[disk].append(name)

    def _map_names(self, state: Mapping[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        prefix = self._model.base_model_prefix
        converted: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
        for name in sorted(self.folder, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            if target not in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            if target not in state:
                self.unused.append(name)
            elif pattern is None:
                self._sources[target] = Origin((name,))
            else:
                renamed, _ = rename_source_key(name, renamings, [], prefix, state)
                converted[target].append((name, self._without_prefix(renamed), pattern))
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        for target, pairs in converted.items():
            names, renamed, patterns = zip(*pairs, strict=True)
            source = Origin(tuple(names), tuple(renamed), tuple(patterns), by_pattern[patterns[0]], target)
            for made in self.convert(source, self.folder.meta):
                self._sources[made] = source
                self._made[source].append(made)

    def _without_prefix(self, name: str) -> str:
        return name.removeprefix(f"{self._model.base_model_prefix}.")

    def convert(self, source: Origin, read: Callable[[str], Tensor], slices: int | None = None) -> dict[str, Tensor]:
        """Run transformers' own conversion (experts stacked, fused layers split): all parameters that it makes.

        Args:
            source: the tensors.
            read: gives them by name.
            slices: number of experts, where the tensors are those of some experts only.
        """
        rule = deepcopy(source.converter)
        for name, pattern in zip(source.names, source.patterns, strict=True):
            tensor = read(name)
            rule.add_tensor(source.target, name, pattern, lambda tensor=tensor: tensor)
        model = self._model if slices is None else Fewer(self._model, slices)
        made = rule.convert(source.target, model=model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def revert(
        self, source: Origin, values: Mapping[str, Tensor], slices: int | None = None, fewer: bool = False
    ) -> dict[str, Tensor]:
        """The tensors on disk, by name, that the conversion would make these parameters of: its inverse.

        Args:
            source: the tensors.
            values: of all parameters that are made of them.
            slices: as of `convert`.
            fewer: whether some tensors may be missing, because parameters have lost experts.

        Raises:
            ValueError: the rule has no inverse, or one with other names.
        """
        from transformers.core_model_loading import apply_converters

        rule = source.converter.reverse_transform()
        for name, tensor in values.items():
            target, pattern = apply_converters(name, [rule])
            if pattern is None:
                raise ValueError(f"{name!r} has no inverse")
            rule.add_tensor(target, name, pattern, tensor)
        model = self._model if slices is None else Fewer(self._model, slices)
        found = rule.convert(target, model=model, config=self._model.config)
        disk = dict(zip(source.renamed, source.names, strict=True))
        made = {self._without_prefix(name) for name in found}
        if not made <= disk.keys() or (made != disk.keys() and not fewer):
            raise ValueError(f"{min(made ^ disk.keys())!r} is not stored")
        pairs = ((disk[self._without_prefix(name)], value) for name, value in found.items())
        return {name: value[0] if isinstance(value, list) else value for name, value in pairs}

    def _reversible(self, source: Origin) -> bool:
        """Whether the inverse of a conversion gives back the stored tensors; tried with two of every kind, or all."""
        rule = id(source.converter)
        if rule not in self._inverses:
            self._inverses[rule] = self._comes_back(_few(source)) or self._comes_back(source)
        return self._inverses[rule]

    def _comes_back(self, source: Origin) -> bool:
        try:
            found = self.revert(source, self.convert(source, self.folder.__getitem__))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False
        return all(
            tensor.shape == self.folder.entries[name].shape and torch.equal(tensor, self.folder[name])
            for name, tensor in found.items()
        )

    def _alias_tied(self, state: Mapping[str, Tensor]) -> None:
        """Read a tied parameter that is not stored from the one it is tied to, whichever of the two is stored."""
        tied = self._model.all_tied_weights_keys
        for target, source in [*tied.items(), *((source, target) for target, source in tied.items())]:
            if target in state and target not in self._sources and source in self._sources:
                self._sources[target] = self._sources[source]

    def _check(self, state: Mapping[str, Tensor]) -> None:
        missing = [name for name in state if name not in self._sources]
        if missing:
            raise InputError(
                f"the checkpoint lacks {len(missing)} of {len(state)} tensors of {type(self._model).__name__}, "
                f"first {missing[0]!r}",
                "use a checkpoint saved from a causal language model, of the class its config names",
            )
        for name, source in self._sources.items():
            for disk in source.names:
                entry = self.folder.entries[disk]
                if state[name].is_floating_point() and not entry.dtype.is_floating_point:
                    raise InputError(
                        f"{disk!r} is stored as {entry.field.dtype}, but {name!r} must be floating-point",
                        "use the unquantised checkpoint, or the config that says how this one is quantised",
                    )
            if source.converter is None and (found := self.folder.entries[source.names[0]].shape) != state[name].shape:
                raise InputError(
                    f"{name!r} is {tuple(found)} on disk but {tuple(state[name].shape)} in the config",
                    "the config does not belong to these weights",
                )

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a parameter or persistent buffer, in the dtype of the result."""
        source = self._sources[name]
        if source.converter is None:
            return self.stored(self.folder[source.names[0]])
        return self.stored(self.convert(source, self.folder.__getitem__)[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def stored(self, tensor: Tensor) -> Tensor:
        """`tensor` cast to the dtype of the result; non-floating tensors as they are."""
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def stored_as_is(self, name: str) -> bool:
        """Whether a parameter is stored without conversion."""
        return self._sources[name].converter is None

    def writable(self, name: str) -> bool:
        """Whether new values of a parameter can be written: it is stored as it is, or the conversion has an inverse."""
        return self.stored_as_is(name) or self._reversible(self._sources[name])

    def origin(self, name: str) -> Origin:
        """The tensors on disk that a parameter is read from."""
        return self._sources[name]

    def is_alone(self, name: str) -> bool:
        """Whether nothing but this parameter is made of the tensors that are converted to it."""
        return self._made[self._sources[name]] == [name]

    def shape(self, name: str) -> torch.Size:
        """The shape of a parameter."""
        return self._shapes[name]

    def shared(self, name: str) -> bool:
        """Whether other parameters are tied to a parameter, beside those that are stored in one tensor with it."""
        source = self._sources[name]
        return not set(self.users(source.names[0])) <= {name, *self._made.get(source, ())}

    def disk_names(self, names: Iterable[str]) -> list[str]:
        """The names on disk that the parameters `names` are read from, each once."""
        return list(dict.fromkeys(disk for name in names for disk in self._sources[name].names))

    def users(self, disk: str) -> list[str]:
        """The parameters that are read from the tensor `disk`; several where they are tied."""
        return self._users.get(disk, [])

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter in the result."""
        source = self.folder.entries[self._sources[name].names[0]].dtype
        return self.dtype if self.dtype is not None and source.is_floating_point else source

    def export(
        self, names: Iterable[str], changed: Mapping[str, Tensor], sliced: Mapping[str, Revert] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Names on disk and tensors to write for some parameters.

        Args:
            names: of the parameters.
            changed: new values by module name.
            sliced: what converts them back slice by slice, for some of those.
        """
        new: dict[str, Tensor] = {}
        converted: dict[Origin, None] = {}
        apart: dict[str, Iterator[tuple[str, Tensor]]] = {}
        gone: set[str] = set()
        for name, tensor in changed.items():
            source = self._sources[name]
            if source.converter is None:
                new[source.names[0]] = tensor
            elif sliced and name in sliced:
                apart |= dict.fromkeys(source.names, sliced[name](tensor))
            else:
                converted[source] = None
        for source in converted:
            made = self._made[source]
            values = {name: changed[name] if name in changed else self[name] for name in made}
            fewer = any(value.shape != self._shapes[name] for name, value in values.items())
            found = self.revert(source, values, fewer=fewer)
            gone.update(set(source.names) - found.keys())
            new |= found
        for disk in self.disk_names(names):
            if disk in gone:
                continue
            if disk in apart:
                # All tensors of a slice come at the name of the first of them.
                while disk not in new:
                    new.update([next(apart[disk])])
                yield disk, self.stored(new.pop(disk)).contiguous()
                continue
            tensor = new[disk] if disk in new else self.folder[disk]
            yield disk, self.stored(tensor).contiguous()

    def out_bytes(self) -> int:
        """Bytes of all tensors in the result."""
        size = 0
        for entry in self.folder.entries.values():
            stored = self.dtype if self.dtype is not None and entry.dtype.is_floating_point else entry.dtype
            size += entry.nbytes * stored.itemsize // entry.dtype.itemsize
        return size

    def check_finite(self, step: Any = None, pruned: Iterable[str] = ()) -> str:
        """Read every tensor once; returns the SHA-256 of names and contents.

        Args:
            step: called with the bytes of every tensor.
            pruned: parameters whose squares must be in the range of float32, too.

        Raises:
            InputError: naming the first tensor that holds NaN or Inf, would in the dtype of the result, or cannot be
                read; or holds nothing but weights that are too small.
        """
        squared = set(self.disk_names(pruned))
        digest = hashlib.sha256()
        for name in self.folder:
            if step is not None:
                step(self.folder.entries[name].nbytes)
            ends: list[Tensor] = []
            for number, part in enumerate(self.folder.pieces(name)):
                if not number:
                    digest.update(f"{name} {part.dtype} {self.folder.entries[name].shape}".encode())
                digest.update(part.flatten().view(torch.uint8).numpy().data)
                if part.is_floating_point() and part.numel():
                    ends += torch.aminmax(part)
            if ends:
                extremes = torch.stack(torch.aminmax(torch.stack(ends)))
                if not bool(torch.isfinite(extremes).all()):
                    raise InputError(f"the weights of {name!r} hold NaN or Inf", "use an undamaged checkpoint")
                largest = float(extremes.abs().max())
                if name in squared and 0 < largest < LEAST:
                    raise InputError(
                        f"the weights of {name!r} are {largest:.1e} at most; below {LEAST:.0e} their squares leave the "
                        "range of float32",
                        "leave this layer out with --skip, or use an undamaged checkpoint",
                    )
                if not bool(torch.isfinite(stored := self.stored(extremes)).all()):
                    raise too_large(name, float(extremes.abs().max()), stored.dtype)
        return digest.hexdigest()
