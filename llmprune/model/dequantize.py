"""What tensors of a checkpoint in FP8 or MXFP4 mean in floating point; each is made when it is read, and not kept.

FP8: `w = q s`, an element in float8 times the scale of its block; the last blocks of a matrix may be smaller. MXFP4
(OCP Microscaling Formats 1.0): 32 values of e2m1 share the scale `2^(e - 127)`; so do the experts of DeepSeek-V4, whose
other matrices are FP8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.compressed_tensors import unpack
from llmprune.model.header import Field
from llmprune.model.quantization import Block, Quantization
from llmprune.model.reader import Entry, HeadersOnly, SafetensorsFolder, too_large

PART = 2**20
"""Elements that are in float32 at the same time."""
GROUP = 32
"""Values of MXFP4 that share a scale."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of four bits."""
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


class Group(Protocol):
    """Tensors on disk that are one tensor of floating point."""

    @property
    def names(self) -> tuple[str, ...]:
        """Theirs."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what they mean."""
        ...

    def read(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """What they mean."""
        ...

    def rows(self, raw: SafetensorsFolder, start: int, stop: int) -> tuple[Group, Mapping[str, Tensor]] | None:
        """A part of them along the first dimension, of which each is a whole matrix, and its tensors; None if not."""
        ...


@dataclass(frozen=True, slots=True)
class Scaled:
    """Matrices in float8, or of two values of four bits a byte, and a scale for every block of them.

    Args:
        values, scales: names on disk.
        shape: of what they mean, `(..., out, in)`.
        block: its rows and columns.
    """

    values: str
    scales: str
    shape: tuple[int, ...]
    block: Block

    @property
    def names(self) -> tuple[str, ...]:
        """On disk."""
        return self.values, self.scales

    @property
    def _grid(self) -> tuple[int, ...]:
        """Rows and columns of the scales of one matrix."""
        return tuple(-(-size // part) for size, part in zip(self.shape[-2:], self.block, strict=True))

    def rows(self, raw: SafetensorsFolder, start: int, stop: int) -> tuple[Group, Mapping[str, Tensor]] | None:
        """Some of its matrices."""
        if len(self.shape) != 3:
            return None
        shared = prod(raw.entries[self.scales].shape) == prod(self._grid)
        scales = raw[self.scales] if shared else raw.rows(self.scales, start, stop)
        part = replace(self, shape=(stop - start, *self.shape[1:]))
        return part, {self.values: raw.rows(self.values, start, stop), self.scales: scales}

    def read(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """`q s`, computed in float32."""
        grid = self._grid
        scales = _floats(raw[self.scales])
        single = (1,) * (len(self.shape) - 2)
        scales = scales.view(*(single if scales.numel() == prod(grid) else self.shape[:-2]), *grid)
        scales = scales.expand(*self.shape[:-2], *grid).reshape(-1, *grid)
        made = torch.empty(self.shape, dtype=dtype)
        matrices = (tensor.view(-1, *tensor.shape[-2:]) for tensor in (raw[self.values], made))
        for values, result, scale in zip(*matrices, scales, strict=True):
            _multiply(values, scale, self.block, result)
        return made


def _floats(scales: Tensor) -> Tensor:
    """Scales in float32."""
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.float() - 127)
    return scales.float()


def _numbers(values: Tensor) -> Tensor:
    """Values in float32; of a byte those of the low bits come first."""
    if values.dtype not in (torch.int8, torch.uint8):
        return values.float()
    bits = values.view(torch.uint8)
    return torch.tensor(E2M1)[torch.stack((bits & 15, bits >> 4), -1).int()].flatten(-2)


def _multiply(values: Tensor, scales: Tensor, block: Block, result: Tensor) -> None:
    """Write the product of a matrix and its scales, some rows at a time.

    Args:
        values: float8, `(out, in)`, or bytes, `(out, in / 2)`.
        scales: float32, `(ceil(out / block[0]), ceil(in / block[1]))`.
        block: rows and columns that share a scale.
        result: `(out, in)`.
    """
    rows, width = result.shape
    step = max(PART // max(width, 1), 1)
    for at in range(0, rows, step):
        end = min(at + step, rows)
        factors = scales[torch.arange(at, end) // block[0]]
        if scales.shape[1] > 1:
            factors = factors.repeat_interleave(block[1], dim=1)[:, :width]
        result[at:end] = _numbers(values[at:end]) * factors


@dataclass(frozen=True, slots=True)
class Packed:
    """The weights of experts in MXFP4, stored with the inputs last and used with the outputs last.

    Args:
        blocks: name of two values a byte, the first in the low bits, `(experts, out, in / 32, 16)`.
        scales: name of the exponents, `(experts, out, in / 32)`.
        shape: `(experts, in, out)`.
    """

    blocks: str
    scales: str
    shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """On disk."""
        return self.blocks, self.scales

    def rows(self, raw: SafetensorsFolder, start: int, stop: int) -> tuple[Group, Mapping[str, Tensor]] | None:
        """Some of the experts."""
        part = replace(self, shape=(stop - start, *self.shape[1:]))
        return part, {name: raw.rows(name, start, stop) for name in self.names}

    def read(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The values times their scales, computed in float32, expert by expert."""
        _, inputs, outputs = self.shape
        made = torch.empty(self.shape, dtype=dtype)
        step = max(PART // max(inputs, 1), 1)
        for packed, exponents, result in zip(raw[self.blocks], raw[self.scales], made, strict=True):
            for at in range(0, outputs, step):
                values = _numbers(packed[at : at + step])
                values *= _floats(exponents[at : at + step])[..., None]
                result[:, at : at + step] = values.view(-1, inputs).T
        return made


@dataclass(frozen=True, slots=True)
class Words:
    """A matrix of integers in 32-bit words, and a scale for every group of inputs of a row.

    Args:
        words: name of the words, int32, `(out, in · bits / 32)`.
        scales: name of the scales, `(out, groups)`.
        beside: name of the matrix's shape, which the words say as well.
        shape: `(out, in)`.
        bits: of an integer.
    """

    words: str
    scales: str
    beside: str
    shape: tuple[int, ...]
    bits: int

    @property
    def names(self) -> tuple[str, ...]:
        """On disk."""
        return self.words, self.scales, self.beside

    def rows(self, raw: SafetensorsFolder, start: int, stop: int) -> tuple[Group, Mapping[str, Tensor]] | None:
        """None: a matrix is read as a whole."""
        return None

    def read(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """`q s`, computed in float32."""
        scales = raw[self.scales].float()
        codes = unpack(raw[self.words], self.bits).view(len(scales), scales.shape[1], -1)
        return (codes * scales[..., None]).view(self.shape).to(dtype)


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
