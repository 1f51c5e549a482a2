"""Lazy reader of the safetensors of a Hugging Face folder; headers and index are checked first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.errors import InputError, UnreadableError
from llmprune.model import header
from llmprune.model.bounded import Stored
from llmprune.model.header import Field, read_header
from llmprune.runtime.foreign import check_inside, open_regular, read_json, reading, reason

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PACKED = ".packed.safetensors"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
TORCH_DTYPES = _DTYPES | {
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Dtypes of whole bytes by safetensors' spelling."""


PIECE = 256 * 2**20
"""Bytes of a tensor that are read at a time where it is looked through."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor stands: its file, and its first byte there; uint8 stands for dtypes that no parameter may have."""

    file: Path
    at: int
    field: Field

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return _DTYPES.get(self.field.dtype, torch.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.field.shape

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.field.nbytes

    def rows(self, start: int, stop: int) -> Entry:
        """Where a part of it stands, along its first dimension; its elements are whole bytes."""
        size = prod(self.shape[1:]) * self.field.itemsize
        field = Field(self.field.dtype, (stop - start, *self.shape[1:]), start * size, stop * size)
        return Entry(self.file, self.at + start * size, field)


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a HF folder by their names on disk, read one at a time; headers are checked when it is opened.

    Raises:
        InputError: no safetensors, a truncated or corrupt file, an index that points outside the folder or nowhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        wanted = _index(folder)
        for file in sorted(set(wanted.values())) if wanted else [folder / SINGLE]:
            check_inside(file, folder)
            self.entries.update(read_entries(file))
            if len(self.entries) > header.MOST_TENSORS:
                raise InputError(
                    f"{folder} holds more than {header.MOST_TENSORS:,} tensors", "a model that large cannot be read"
                )
        for name, file in wanted.items():
            if name not in self.entries or self.entries[name].file != file:
                raise InputError(
                    f"{INDEX} says tensor {name!r} is in {file.name}, but it is not there", _DOWNLOAD_AGAIN
                )

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self.entries[name], name)

    def _read(self, entry: Entry, name: str) -> Tensor:
        try:
            return read_tensor(entry) if entry.field.itemsize else read_unusual(entry.file, name)
        except (SafetensorError, OSError) as error:
            raise UnreadableError(
                f"tensor {name!r} of {entry.file} cannot be read: {error}", _DOWNLOAD_AGAIN
            ) from error

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A part of a tensor along its first dimension; nothing else of it is read where it is `in_rows`."""
        entry = self.entries[name]
        return self._read(entry.rows(start, stop), name) if self.in_rows(name) else self[name][start:stop]

    def in_rows(self, name: str) -> bool:
        """Whether a part of a tensor along its first dimension can be read alone."""
        return self.entries[name].field.itemsize > 0

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor in parts along its first dimension, each of at most `PIECE` bytes if rows are that small."""
        entry = self.entries[name]
        if entry.nbytes <= PIECE or not self.in_rows(name):
            yield self[name]
            return
        step = max(PIECE * entry.shape[0] // entry.nbytes, 1)
        for start in range(0, entry.shape[0], step):
            yield self.rows(name, start, min(start + step, entry.shape[0]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def meta(self, name: str) -> Tensor:
        """A tensor on the meta device, of the shape and dtype on disk."""
        entry = self.entries[name]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    @property
    def stored(self) -> Stored:
        """Number of tensors and of weights."""
        return Stored(len(self), sum(prod(entry.shape) for entry in self.entries.values()))

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(entry.nbytes for entry in self.entries.values())


class HeadersOnly(SafetensorsFolder):
    """Tensors whose files are elsewhere: what can be known without their values.

    A tensor that is read has arbitrary values, the same every time, by which the form of a model shows: which layers
    are called, and what feeds them.

    Args:
        folder: where the files would be.
        entries: from their headers.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self.folder, self.entries = folder, dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        return self._arbitrary(name, self.entries[name].shape, 0)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A part of a tensor along its first dimension."""
        shape = self.entries[name].shape[1:]
        return self._arbitrary(name, (stop - start, *shape), start * prod(shape))

    def _arbitrary(self, name: str, shape: tuple[int, ...], start: int) -> Tensor:
        dtype = self.entries[name].dtype
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        # A prime number of values, so that rows differ; drawing as many as there are weights would take long.
        drawn = 0.05 * torch.randn(8191, generator=torch.Generator().manual_seed(crc32(name.encode())))
        size = prod(shape)
        return drawn.to(dtype).roll(-start).repeat(-(-size // len(drawn)))[:size].view(shape)


def too_large(name: str, largest: float, dtype: torch.dtype) -> InputError:
    """The error that the weights of `name`, `largest` at most, leave the range of `dtype`."""
    return InputError(
        f"the weights of {name!r} reach {largest:,.0f}, the largest {str(dtype).removeprefix('torch.')} is "
        f"{torch.finfo(dtype).max:,.0f}",
        "store them in another type, such as --dtype bfloat16",
    )


_DOWNLOAD_AGAIN = "the file is damaged or incomplete; download or save the model again"


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index; empty where the folder has a single file."""
    single = first_weights({path.name for path in folder.iterdir()}, str(folder)) == SINGLE
    return {} if single else read_index(folder / INDEX)


def first_weights(names: Collection[str], where: str) -> str:
    """The file that transformers opens first, `SINGLE` or `INDEX`; an index beside a whole file is not looked at.

    Args:
        names: of the files in a model folder, or of those in a repository.
        where: the folder or the repository.

    Raises:
        InputError: there is neither, or the weights are packed.
    """
    names = {name for name in names if "/" not in name}
    if any(name.endswith(PACKED) for name in names):
        raise InputError(f"{where} is packed", f"unpack it first: llmprune unpack {where}")
    if found := next((name for name in (SINGLE, INDEX) if name in names), ""):
        return found
    if pickles := sorted(name for name in names if name.endswith(".bin") or fnmatchcase(name, "*.pt*")):
        raise InputError(
            f"{where} holds only pickled weights ({pickles[0]}), which can run code when read",
            "convert them where you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
        )
    raise InputError(f"{where} has no {SINGLE} and no {INDEX}", "--model takes a Hugging Face model folder")


def read_index(path: Path) -> dict[str, Path]:
    """Tensor name -> file, from an index.

    Raises:
        InputError: it is damaged, or points outside its folder.
    """
    with reading(f"{path} is not a safetensors index", _DOWNLOAD_AGAIN):
        check_inside(path, path.parent)
        weight_map = read_json(path, unique=True)["weight_map"]
        items = [(str(name), str(file)) for name, file in weight_map.items()]
    for _, file in items:
        if Path(file).name != file or file in {"", ".", ".."} or "\\" in file:
            raise InputError(f"{path} points outside its folder: {file!r}", "do not use this checkpoint")
    return {name: path.with_name(file) for name, file in items}


def entry_of(file: Path, dtype: str, shape: Iterable[int], offsets: Iterable[int]) -> Entry:
    """The entry of a tensor, from what a header says of it.

    Raises:
        TypeError, ValueError: it cannot be.
    """
    field = Field(dtype, tuple(shape), *offsets)
    if fault := field.fault():
        raise ValueError(f"a tensor {fault}")
    return Entry(file, 0, field)


def read_entries(file: Path) -> dict[str, Entry]:
    """The entries of the header of a safetensors file, checked against its size.

    Raises:
        InputError: the file is missing, truncated, or not safetensors.
    """
    try:
        with open_regular(file) as stream:
            text, _, fields = read_header(stream)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not a whole safetensors file: {reason(error)}", _DOWNLOAD_AGAIN) from error
    return {name: Entry(file, 8 + len(text) + field.start, field) for name, field in fields.items()}


def read_tensor(entry: Entry) -> Tensor:
    """A tensor, in memory: of a mapping every page ever touched would count as resident.

    Raises:
        OSError: the file cannot be read, or has become shorter.
    """
    data = torch.empty(entry.nbytes, dtype=torch.uint8)
    with open_regular(entry.file) as stream:
        stream.seek(entry.at)
        if (found := stream.readinto(data.numpy().data)) != entry.nbytes:  # type: ignore[attr-defined]
            raise OSError(f"it has {found:,} of {entry.nbytes:,} bytes")
    return data.view(TORCH_DTYPES[entry.field.dtype]).view(entry.shape)


def read_unusual(file: Path, name: str) -> Tensor:
    """A tensor whose elements are no whole bytes; it is only carried along."""
    with safe_open(file, framework="pt", device="cpu") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor.clone()
