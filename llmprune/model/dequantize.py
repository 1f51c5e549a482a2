"""The tensors of a checkpoint in fewer bits as floating point: which belong together, found by names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.header import Field
from llmprune.model.quantization import Block, Quantization
from llmprune.model.reader import Entry, HeadersOnly, SafetensorsFolder, too_large
from llmprune.model.stored_forms import GROUP, Group, Packed, Scaled, Words

FLOAT8 = ("F8_E4M3", "F8_E5M2")
PAIRS = "I8"
"""Two values of four bits, where they have scales as those of float8."""
SCALES = ("F32", "F16", "BF16", "F8_E8M0", "U8")
"""Dtypes of scales; a byte is an exponent, as in E8M0."""
UNUSED = ("activation_scale", "input_scale", "input_scale_ub", "input_zero_point", "output_scale")
"""What may stand beside float8 weights and is about activations."""
CACHE = ("k_scale", "v_scale", "q_scale")
"""Scales of the attention's cache."""
SPELLED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
ORIGINAL = "download the model again, or prune the original one, before it was quantised"


class DequantizedFolder(SafetensorsFolder):
    """A folder in which every group of tensors stands as the one tensor that it means.

    Args:
        raw: the tensors on disk.
        entries: of what they mean, see `plain_entries`.
        groups: by the name of what they mean.
        dtype: of that.
    """

    def __init__(
        self, raw: SafetensorsFolder, entries: Mapping[str, Entry], groups: Mapping[str, Group], dtype: torch.dtype
    ) -> None:
        self.folder, self.entries = raw.folder, dict(entries)
        self._raw, self._groups, self._dtype = raw, groups, dtype

    def __getitem__(self, name: str) -> Tensor:
        if (group := self._groups.get(name)) is None:
            return self._raw[name]
        return self._made(name, group, self._raw)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A part of a tensor along its first dimension."""
        if (group := self._groups.get(name)) is None:
            return self._raw.rows(name, start, stop)
        part = group.rows(self._raw, start, stop)
        return self[name][start:stop] if part is None else self._made(name, *part)

    def in_rows(self, name: str) -> bool:
        """Whether a part of a tensor along its first dimension can be read alone."""
        group = self._groups.get(name)
        return self._raw.in_rows(name) if group is None else group.rows(self._raw, 0, 0) is not None

    def _made(self, name: str, group: Group, raw: Mapping[str, Tensor]) -> Tensor:
        made = group.read(raw, self._dtype)
        # The other types hold every product: they have the range of float32.
        if self._dtype is torch.float16 and bool(made.isinf().any()):
            exact = group.read(raw, torch.float32)
            if bool(exact.isfinite().all()):
                raise too_large(name, float(exact.abs().max()), self._dtype)
        return made


def dequantized(raw: SafetensorsFolder, how: Quantization, dtype: torch.dtype = torch.bfloat16) -> SafetensorsFolder:
    """The tensors of a folder in floating point, under the names that the unquantised model has.

    Args:
        raw: the tensors on disk.
        how: they are stored.
        dtype: of those that are dequantised; all others are as they are.

    Raises:
        InputError: values lack their scales, or the shapes of the two disagree.
    """
    groups = find_groups(raw.entries, how)
    entries = plain_entries(raw.entries, groups, dtype)
    if isinstance(raw, HeadersOnly):
        return HeadersOnly(raw.folder, entries)
    return DequantizedFolder(raw, entries, groups, dtype)


def plain_entries(entries: Mapping[str, Entry], groups: Mapping[str, Group], dtype: torch.dtype) -> dict[str, Entry]:
    """What a folder holds in floating point: shapes and sizes of the tensors that are made when they are read."""
    first = {group.names[0]: name for name, group in groups.items()}
    parts = {part for group in groups.values() for part in group.names}
    beside = {extra for group in groups.values() for extra in _beside(group.names[0])}
    found = {}
    for name, entry in entries.items():
        if name in first:
            shape = groups[first[name]].shape
            found[first[name]] = Entry(entry.file, 0, Field(SPELLED[dtype], shape, 0, prod(shape) * dtype.itemsize))
        elif name not in parts and name not in beside and not _of_cache(name, entry):
            found[name] = entry
    return found


def _of_cache(name: str, entry: Entry) -> bool:
    return name.rpartition(".")[2] in CACHE and prod(entry.shape) == 1


def find_groups(entries: Mapping[str, Entry], how: Quantization) -> dict[str, Group]:
    """The groups of a folder, by the name of what they mean; what has no scale is none.

    Raises:
        InputError: values lack their scales, or scales their values; their shapes or dtypes disagree.
    """
    groups: dict[str, Group] = dict(_scaled(entries, how))
    if how.packed:
        groups |= _packed(entries)
    if how.bits:
        groups |= _words(entries, how.bits)
    used = {name for group in groups.values() for name in group.names}
    for name, entry in entries.items():
        if name not in used and entry.field.dtype in FLOAT8:
            raise _unscaled(name, entries)
        if name not in used and name.endswith(("weight_scale_inv", "weight_scale")):
            values = name.removesuffix("_inv").removesuffix("_scale")
            kind = f"stored as {entries[values].field.dtype}" if values in entries else "not there"
            raise InputError(f"{name!r} holds scales of float8 values, but {values!r} is {kind}", ORIGINAL)
    return groups


def _unscaled(name: str, entries: Mapping[str, Entry]) -> InputError:
    lacking = [name for name, entry in entries.items() if entry.field.dtype in FLOAT8 and not _scale_of(name, entries)]
    total = sum(entry.field.dtype in FLOAT8 for entry in entries.values())
    return InputError(
        f"{len(lacking)} of {total} float8 tensors have no scales, first {name!r} of {entries[name].shape}: there is "
        f"no {_scale_names(name)[0]!r}",
        ORIGINAL,
    )


def _scale_names(name: str) -> list[str]:
    """The names that the scales of a tensor may have."""
    short = [f"{name.removesuffix('weight')}{kind}" for kind in ("scale", "qscale_weight")]
    return [f"{name}_scale_inv", f"{name}_scale", *(short if name.endswith(".weight") else [])]


def _scale_of(name: str, entries: Mapping[str, Entry]) -> str:
    return next((scale for scale in _scale_names(name) if scale in entries), "")


def _beside(name: str) -> list[str]:
    """The names of what is about the activations that meet float8 values."""
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    return [f"{stem}{kind}" for kind in UNUSED]


def _scaled(entries: Mapping[str, Entry], how: Quantization) -> Iterator[tuple[str, Group]]:
    for name, entry in entries.items():
        if entry.field.dtype not in (*FLOAT8, PAIRS) or not (scale := _scale_of(name, entries)):
            continue
        if f"{name}_zero_point" in entries:
            raise InputError(
                f"{name!r} is quantised asymmetrically: there is a {f'{name}_zero_point'!r}",
                "only symmetric FP8 is read; prune the original model, then quantise the result",
            )
        _check_dtype(scale, entries[scale], SCALES)
        pairs = entry.field.dtype == PAIRS and entry.shape
        shape = (*entry.shape[:-1], 2 * entry.shape[-1]) if pairs else entry.shape
        yield (
            name,
            Scaled(name, scale, shape, _block_of(name, shape, scale, entries[scale].shape, FOURS if pairs else how)),
        )


FOURS = Quantization("two values a byte", ((1, GROUP),))


def _check_dtype(name: str, entry: Entry, known: tuple[str, ...]) -> None:
    if entry.field.dtype not in known:
        raise InputError(f"{name!r} is stored as {entry.field.dtype}, not as {' or '.join(known)}", ORIGINAL)


def _block_of(name: str, shape: tuple[int, ...], scale: str, found: tuple[int, ...], how: Quantization) -> Block:
    """The block that a scale belongs to.

    Raises:
        InputError: there is another number of scales than of blocks.
    """
    if len(shape) < 2 or not prod(shape):
        raise InputError(f"{name!r} of {shape} has scales, but is no matrix", ORIGINAL)
    *lead, rows, width = shape
    grid = _grid(shape, found)
    blocks = [(block[0] or rows, block[1] or width) for block in how.blocks]
    if not blocks and grid and not rows % grid[0] and not width % grid[1]:
        blocks = [(rows // grid[0], width // grid[1])]
    counts = [(-(-rows // high), -(-width // wide)) for high, wide in blocks]
    if grid in counts:
        return blocks[counts.index(grid)]
    wanted = " or ".join(str((*lead, *count)) for count in counts) or "numbers that divide them"
    raise InputError(f"{scale!r} is {found}, but {name!r} of {shape} ({how.form}) needs scales of {wanted}", ORIGINAL)


def _grid(shape: tuple[int, ...], found: tuple[int, ...]) -> Block | None:
    """Rows and columns of the scales of one matrix, where the shape of all scales can be that."""
    lead = shape[:-2]
    if prod(found) == 1 or (lead and found == lead):
        return 1, 1
    if len(found) == len(shape) and found[:-2] == lead and min(found) > 0:
        return found[-2], found[-1]
    return (found[-1], 1) if found == shape[:-1] else None


def _words(entries: Mapping[str, Entry], bits: int) -> Iterator[tuple[str, Group]]:
    for name, entry in entries.items():
        plain, _, kind = name.rpartition("_")
        if kind != "packed":
            continue
        scales, shape = f"{plain}_scale", f"{plain}_shape"
        for beside in (scales, shape):
            if beside not in entries:
                raise InputError(f"{name!r} of {entry.shape} has no scales or shape: there is no {beside!r}", ORIGINAL)
        _check_dtype(name, entry, ("I32",))
        _check_dtype(scales, entries[scales], SCALES[:3])
        found = entries[scales].shape
        if len(entry.shape) != 2 or len(found) != 2 or found[0] != entry.shape[0] or not found[1]:
            raise InputError(f"{scales!r} is {found}, but {name!r} is {entry.shape}", ORIGINAL)
        width = entry.shape[1] * 32 // bits
        if width % found[1]:
            raise InputError(f"{scales!r} is {found}, but {name!r} has {width} inputs a row", ORIGINAL)
        yield plain, Words(name, scales, shape, (entry.shape[0], width), bits)


def _packed(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Group]]:
    for name, entry in entries.items():
        plain, _, kind = name.rpartition("_")
        if kind == "scales" and entry.field.dtype == "U8" and f"{plain}_blocks" not in entries:
            raise InputError(f"{name!r} has no {f'{plain}_blocks'!r} beside it", ORIGINAL)
        if kind != "blocks":
            continue
        scales = f"{plain}_scales"
        if scales not in entries:
            raise InputError(f"{name!r} of {entry.shape} has no scales: there is no {scales!r}", ORIGINAL)
        if plain in entries:
            raise InputError(f"{plain!r} is stored twice: plain, and as {name!r}", ORIGINAL)
        for one in (name, scales):
            _check_dtype(one, entries[one], ("U8",))
        if len(entry.shape) != 4 or entry.shape[-1] != GROUP // 2 or entries[scales].shape != entry.shape[:-1]:
            raise InputError(
                f"{scales!r} is {entries[scales].shape}, but {name!r} is {entry.shape}: MXFP4 needs (experts, out, "
                f"in / {GROUP}), and the same with {GROUP // 2} bytes each",
                ORIGINAL,
            )
        experts, out, groups, _ = entry.shape
        yield plain, Packed(name, scales, (experts, GROUP * groups, out))
