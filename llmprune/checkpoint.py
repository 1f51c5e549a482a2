"""Checkpoints larger than memory: read lazily, written shard by shard.

Names on disk are not always the module's: a checkpoint of the base model lacks the prefix, old ones use legacy names,
experts may be fused on load. `Checkpoint` maps them with transformers' own rules; what is written keeps the names of
the source, so that whatever loaded the source loads the result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune.durable import replacing, sha256, sync
from llmprune.errors import InputError, PruneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PACKED = ".packed.safetensors"
SHARD_BYTES = 2 * 2**30
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: file, dtype, shape and size in bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


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
            self.entries.update(read_header(file))
        for name, file in wanted.items():
            if name not in self.entries or self.entries[name].file != file:
                raise InputError(
                    f"{INDEX} says tensor {name!r} is in {file.name}, but it is not there", _DOWNLOAD_AGAIN
                )

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        try:
            # Opened per read: a mapping that stays open would count every page ever touched as resident.
            with safe_open(entry.file, framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor.clone()
        except (SafetensorError, OSError) as error:
            raise InputError(f"tensor {name!r} of {entry.file} cannot be read: {error}", _DOWNLOAD_AGAIN) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def meta(self, name: str) -> Tensor:
        """A tensor without data, of the right shape and dtype."""
        entry = self.entries[name]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(entry.nbytes for entry in self.entries.values())


_DOWNLOAD_AGAIN = "the file is damaged or incomplete; download or save the model again"


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index; empty where the folder has a single file."""
    path = folder / INDEX
    if next(folder.glob(f"*{PACKED}"), None):
        raise InputError(f"{folder} is packed", f"unpack it first: llmprune unpack {folder}")
    if not path.exists():
        if (folder / SINGLE).exists():
            return {}
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        if pickles:
            raise InputError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read",
                "convert them where you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
            )
        raise InputError(f"{folder} has no {SINGLE} and no {INDEX}", "--model takes a Hugging Face model folder")
    return read_index(path)


def read_index(path: Path) -> dict[str, Path]:
    """Tensor name -> file, from an index.

    Raises:
        InputError: it is none, or points outside its folder.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        items = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is not a safetensors index: {error!r}", _DOWNLOAD_AGAIN) from error
    for _, file in items:
        if Path(file).name != file or file in {"", ".", ".."} or "\\" in file:
            raise InputError(f"{path} points outside its folder: {file!r}", "do not use this checkpoint")
    return {name: path.with_name(file) for name, file in items}


def read_header(file: Path) -> dict[str, Entry]:
    """Parse and check the header of a safetensors file.

    Raises:
        InputError: the file is missing, truncated, or not safetensors.
    """

    def bad(reason: str) -> InputError:
        return InputError(f"{file} is not a whole safetensors file: {reason}", _DOWNLOAD_AGAIN)

    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, 100 * 2**20):
                raise bad(f"its header claims {length} bytes of {size}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise bad(error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise bad("its header is no JSON") from error
    entries, end = {}, 0
    try:
        header.pop("__metadata__", None)
        for name, item in header.items():
            start, stop = item["data_offsets"]
            dtype = _DTYPES.get(item["dtype"], torch.uint8)
            entries[name] = Entry(file, dtype, tuple(int(n) for n in item["shape"]), stop - start)
            end = max(end, stop)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise bad("its header has the wrong form") from error
    if 8 + length + end != size:
        raise bad(f"it has {size} bytes, its header says {8 + length + end}")
    return entries


@dataclass(frozen=True, slots=True)
class _Source:
    """How the tensors of one or more parameters come from the disk: the names there, and the conversion if any."""

    names: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    converter: Any = None


class Checkpoint(Mapping[str, Tensor]):
    """The parameters of a model by module name, read lazily from a folder.

    Args:
        folder: the tensors on disk.
        model: the model on the meta device; tells names and shapes.
        dtype: what floating tensors are stored as in the result, or None for the dtype of the source.

    Raises:
        InputError: the checkpoint does not cover the model, or a shape differs.
    """

    def __init__(self, folder: SafetensorsFolder, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        self.folder = folder
        self.dtype = dtype
        self._model = model
        state = dict(model.state_dict(keep_vars=True))
        self._sources: dict[str, _Source] = {}
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
        converted: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in sorted(self.folder, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            if target not in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            if target not in state:
                self.unused.append(name)
            elif pattern is None:
                self._sources[target] = _Source((name,))
            else:
                converted[target].append((name, pattern))
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        for target, pairs in converted.items():
            names, patterns = zip(*pairs, strict=True)
            source = _Source(tuple(names), tuple(patterns), by_pattern[patterns[0]])
            for made in self._convert(source, target, meta=True):
                self._sources[made] = source

    def _convert(self, source: _Source, target: str, meta: bool = False) -> dict[str, Tensor]:
        """Run transformers' own conversion (experts stacked, fused layers split) for one parameter."""
        rule = deepcopy(source.converter)
        for name, pattern in zip(source.names, source.patterns, strict=True):
            tensor = self.folder.meta(name) if meta else self.folder[name]
            rule.add_tensor(target, name, pattern, lambda tensor=tensor: tensor)
        made = rule.convert(target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _alias_tied(self, state: Mapping[str, Tensor]) -> None:
        """A tied parameter that is not stored is read from the one it is tied to, whichever of the two is there."""
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
            if source.converter is None and (found := self.folder.entries[source.names[0]].shape) != state[name].shape:
                raise InputError(
                    f"{name!r} is {tuple(found)} on disk but {tuple(state[name].shape)} in the config",
                    "the config does not belong to these weights",
                )

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a parameter or persistent buffer, in the dtype it will be stored in."""
        source = self._sources[name]
        if source.converter is None:
            return self.stored(self.folder[source.names[0]])
        return self.stored(self._convert(source, name)[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def stored(self, tensor: Tensor) -> Tensor:
        """`tensor` rounded to the dtype it will be stored in; non-floating tensors as they are."""
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def writable(self, name: str) -> bool:
        """Whether a parameter is stored as it is, so that new values can be written under the name on disk."""
        return self._sources[name].converter is None

    def disk_names(self, names: Iterable[str]) -> list[str]:
        """The names on disk that the parameters `names` are made of, each once."""
        return list(dict.fromkeys(disk for name in names for disk in self._sources[name].names))

    def users(self, disk: str) -> list[str]:
        """The parameters that the tensor `disk` is read for; several where they are tied."""
        return self._users.get(disk, [])

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype a parameter will be stored in."""
        own = self.folder.entries[self._sources[name].names[0]].dtype
        return self.dtype if self.dtype is not None and own.is_floating_point else own

    def export(self, names: Iterable[str], changed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What to write for the parameters `names`: disk name and tensor; `changed` (by module name) has new values."""
        new = {self._sources[name].names[0]: tensor for name, tensor in changed.items()}
        for disk in self.disk_names(names):
            tensor = new[disk] if disk in new else self.folder[disk]
            yield disk, self.stored(tensor).contiguous()

    def out_bytes(self) -> int:
        """Size of all tensors as they will be stored."""
        size = 0
        for entry in self.folder.entries.values():
            stored = self.dtype if self.dtype is not None and entry.dtype.is_floating_point else entry.dtype
            size += entry.nbytes * stored.itemsize // entry.dtype.itemsize
        return size

    def check_finite(self, step: Any = None) -> str:
        """Read every tensor once; returns the SHA-256 of names and contents.

        Raises:
            InputError: naming the first tensor that holds NaN or Inf, or cannot be read.
        """
        digest = hashlib.sha256()
        for name in self.folder:
            if step is not None:
                step(self.folder.entries[name].nbytes)
            tensor = self.folder[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
            if tensor.is_floating_point() and tensor.numel():
                low, high = torch.aminmax(tensor)
                if not bool(torch.isfinite(low) & torch.isfinite(high)):
                    raise InputError(f"the weights of {name!r} hold NaN or Inf", "use an undamaged checkpoint")
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Shard:
    """A file that was written: its name in the folder, what it holds, the bytes of that, the file's hash."""

    file: str
    tensors: list[str]
    nbytes: int
    sha256: str


class ShardWriter:
    """Writes a HF folder shard by shard; every file appears under its name only when it is whole and durable.

    Args:
        folder: an existing folder.
        shards: those that it holds already.
    """

    def __init__(self, folder: Path, shards: Iterable[Shard] = ()) -> None:
        self.folder = folder
        self.shards = list(shards)
        self._written = {name for shard in self.shards for name in shard.tensors}

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(shard.nbytes for shard in self.shards)

    def write(self, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD_BYTES) -> None:
        """Write tensors as one shard, or as several where they exceed `limit` bytes; a name only the first time."""
        shard: dict[str, Tensor] = {}
        size = 0
        for name, tensor in tensors:
            if name in self._written:
                continue
            self._written.add(name)
            if shard and size + tensor.nbytes > limit:
                self._save(shard)
                shard, size = {}, 0
            shard[name] = tensor
            size += tensor.nbytes
        if shard:
            self._save(shard)

    def _save(self, shard: dict[str, Tensor]) -> None:
        path = self.folder / f"shard-{len(self.shards) + 1:05d}.safetensors"
        try:
            with replacing(path) as temporary:
                save_file(shard, temporary, metadata={"format": "pt"})
            nbytes = sum(tensor.nbytes for tensor in shard.values())
            self.shards.append(Shard(path.name, list(shard), nbytes, sha256(path)))
        except (OSError, SafetensorError) as error:
            raise PruneError(
                f"cannot write {path}: {error}",
                "free disk space and run the same command again, or choose another --out",
            ) from error

    def final_names(self) -> list[str]:
        """What the shards are called in a complete folder."""
        total = len(self.shards)
        return [SINGLE] if total == 1 else [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]

    def seal(self) -> None:
        """Give the shards their final names and write the index."""
        weight_map, total = {}, len(self.shards)
        for shard, final in zip(self.shards, self.final_names(), strict=True):
            os.replace(self.folder / shard.file, self.folder / final)
            weight_map.update(dict.fromkeys(shard.tensors, final))
        if total > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / INDEX, index)

    def unseal(self) -> None:
        """Take back a seal that may have been broken off; what is no shard goes."""
        for shard, final in zip(self.shards, self.final_names(), strict=True):
            if (self.folder / final).exists():
                os.replace(self.folder / final, self.folder / shard.file)
        for path in self.folder.iterdir():
            if path.name not in {shard.file for shard in self.shards}:
                path.unlink()


def write_json(path: Path, value: object) -> None:
    """Write JSON under a temporary name, then rename."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_folder(new: Path, target: Path) -> None:
    """Put the finished folder `new` in the place of `target`."""
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(new, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(new, target)
    sync(target.parent)


def copy_companions(source: Path, target: Path) -> None:
    """Copy everything stock loaders need beside the weights: tokenizer, generation config, remote code, licence."""
    wanted = re.compile(
        r"tokenizer.*|.*tokens.*\.json|vocab.*|merges\.txt|.*\.model|chat_template.*|generation_config\.json"
        r"|preprocessor_config\.json|.*\.py|.*\.jinja|(LICENSE|NOTICE|USE_POLICY).*",
        re.IGNORECASE,
    )
    for path in sorted(source.iterdir()):
        if path.is_file() and wanted.fullmatch(path.name):
            shutil.copyfile(path, target / path.name)
