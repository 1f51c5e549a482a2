"""A model folder as a GGUF file for llama.cpp: `llmprune export DIR gguf`.

One tensor at a time is in memory, read as the rest of llmprune reads it, so that a folder whose weights are stored in
fewer bits is exported with what they mean. The file is read again before it gets its name: every zero is still there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from llmprune.errors import CheckError, InputError, PruneError, printable
from llmprune.export.gguf_families import (
    OTHER_WAY,
    Family,
    family_of,
    head_width,
    interleave,
    rope_factors,
    settings_of,
)
from llmprune.export.gguf_types import FILE_TYPES, KINDS, LOSSLESS, byte_shape, decode, encode, kind_of, pieces
from llmprune.export.gguf_vocab import vocabulary
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.skeleton import build_on_meta
from llmprune.progress import Progress
from llmprune.runtime.files import replacing
from llmprune.runtime.foreign import read_json, reading, user_path
from llmprune.sources.demo import default_cache
from llmprune.sources.gguf_header import read_gguf_header
from llmprune.sources.models import Source, load_tokenizer, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SUFFIXES = (".weight", ".bias")
PAIRED, GATE, UP = "gate_up_proj", "gate_proj", "up_proj"
"""The experts' two matrices that transformers keeps in one parameter, `(experts, 2 · out, in)`."""
BLOCK = 32
"""Weights that share a scale."""
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the file.

    Args:
        name: in GGUF.
        shape: `(..., out, in)`.
        kind: its type.
        read: gives it, float32.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return prod(byte_shape(self.shape, self.kind))


@dataclass(slots=True)
class GgufReport:
    """The result of `llmprune export DIR gguf`.

    Args:
        out: the file that was written.
        architecture: llama.cpp's name for it.
        type: of its matrices.
        tensors: number of them.
        size: of the file, bytes.
        zeros: exact zeros in the source, and in the file.
        float16: matrices that are float16 instead, because their rows are no whole number of blocks, and the width.
    """

    out: str
    architecture: str
    type: str
    tensors: int = 0
    size: int = 0
    zeros: list[int] = field(default_factory=lambda: [0, 0])
    float16: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def text(self) -> str:
        """A summary in a few lines."""
        before, after = self.zeros
        lines = [
            f"{self.tensors} tensors of {self.architecture} in {self.type}: {self.size / 2**20:.1f} MiB",
            f"read again: all {before:,} zeros of the weights are zero in the file ({after:,} there)",
        ]
        for width in dict.fromkeys(self.float16.values()):
            names = [name for name, found in self.float16.items() if found == width]
            lines.append(
                f"float16: {len(names)} matrices, first {names[0]}: their rows of {width} are no multiple of {BLOCK}"
            )
        return "\n".join(map(printable, [*lines, f"saved to {self.out}"]))


def export_gguf(
    folder: Path,
    out: Path | None = None,
    *,
    kind: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GgufReport:
    """Write a model as a GGUF file that llama.cpp runs.

    Args:
        folder: of a model, pruned or not.
        out: file to make; None for the name of `folder` and the type, beside it.
        kind: type of the matrices, one of `GGUF_TYPES`; None for that of the embeddings, without loss where all weights
            have it.
        overwrite: whether to replace a file.
        progress: notified of the steps.

    Raises:
        InputError: no such folder, a model or a tokenizer that llama.cpp does not have, `out` exists.
        CheckError: a zero was lost; nothing is left at `out`.
        PruneError: it cannot be written; nothing is left at `out`.
    """
    folder, progress = user_path(folder), progress or Progress()
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}", "name a model folder")
    source = open_source(
        str(folder), revision=None, cache=default_cache(), trust_remote_code=False, progress=Progress()
    )
    family = family_of(source.config)
    weights = source.weights(torch.float32)
    model = build_on_meta(source.config, torch.float32, stored=weights.stored)
    checkpoint = Checkpoint(weights, model)
    embeddings, head = (_name_of(model, part) for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    kind = kind or LOSSLESS.get(checkpoint.stored_dtype(embeddings), "f32")
    out = user_path(out or folder.resolve().with_name(f"{folder.resolve().name}-{kind}.gguf"))
    _check_free(out, overwrite)
    settings = settings_of(source.config, family, checkpoint.shape(embeddings)[0])
    header = {f"{family.architecture}.{key}": value for key, value in settings.items()}
    header |= _general(folder.resolve().name, KINDS[kind])
    header |= vocabulary(load_tokenizer(source, False), checkpoint.shape(embeddings)[0], _stops(source), progress)
    tied = not family.head and _is_tied(checkpoint, embeddings, head)
    names = [name for name in checkpoint if not (tied and name == head)]
    tensors = list(plan(checkpoint, names, source.config, family, KINDS[kind]))
    report = GgufReport(str(out), family.architecture, kind, len(tensors))
    for tensor in tensors:
        if tensor.kind == Kind.F16 and KINDS[kind] != Kind.F16:
            report.float16[tensor.name] = tensor.shape[-1]
    with _writing(out, sum(tensor.nbytes for tensor in tensors)), replacing(out) as partial:
        write(partial, family.architecture, header, tensors, progress)
        report.zeros = list(check_zeros(partial, tensors, progress))
        report.size = partial.stat().st_size
    return report


def _name_of(model: torch.nn.Module, part: torch.nn.Module) -> str:
    name = next(name for name, module in model.named_modules() if module is part)
    return f"{name}.weight"


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_dir() or not out.parent.is_dir():
        wrong = "is a folder" if out.is_dir() else f"lies in no folder: there is no {out.parent}"
        raise InputError(f"{out} {wrong}", "--out takes the name of a file")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already", "choose another --out, or add --overwrite")


@contextmanager
def _writing(out: Path, needed: int) -> Iterator[None]:
    """Too little room on the disk is found before; what it refuses later is an error of ours."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise InputError(
            f"{out.name} needs {needed / 2**20:,.0f} MiB, but {out.parent} has {free / 2**20:,.0f} MiB free",
            "free disk space, or choose another --out",
        )
    try:
        yield
    except OSError as error:
        raise PruneError(
            f"cannot write {out}: {error.strerror or error}", "free disk space or choose another --out"
        ) from error


def _general(name: str, kind: Kind) -> dict[str, Any]:
    return {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(FILE_TYPES[kind]),
        "general.quantization_version": int(GGML_QUANT_VERSION),
    }


def _stops(source: Source) -> list[int]:
    """The tokens that end a text, as the folder's generation config says."""
    path = source.folder / "generation_config.json"
    if not path.exists():
        return []
    with reading(f"{path} cannot be used", "download or save the model again"):
        said = read_json(path).get("eos_token_id")
        return [int(number) for number in (said if isinstance(said, list) else [said]) if number is not None]


def _is_tied(checkpoint: Checkpoint, embeddings: str, head: str) -> bool:
    """Whether the head is the embeddings; then llama.cpp takes those for both."""
    names = [checkpoint.disk_names([name]) for name in (embeddings, head)]
    if checkpoint.shape(embeddings) != checkpoint.shape(head):
        return False
    return names[0] == names[1] or torch.equal(checkpoint[embeddings], checkpoint[head])


def plan(
    checkpoint: Checkpoint, names: Sequence[str], config: PreTrainedConfig, family: Family, wanted: Kind
) -> Iterator[Planned]:
    """The tensors of the file, in their order.

    Args:
        checkpoint: of the model.
        names: of its parameters.
        config: of the model.
        family: of the config.
        wanted: type of the matrices.

    Raises:
        InputError: llama.cpp has no place for a parameter.
    """
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    known = get_tensor_name_map(numbers[family.architecture], config.num_hidden_layers)
    if (factors := rope_factors(config)) is not None:
        yield Planned(ROPE_FACTORS, tuple(factors.shape), Kind.F32, lambda: factors)
    for parameter in names:
        for part, cut in _parts(parameter):
            name = known.get_name(part, SUFFIXES)
            if name is None:
                raise InputError(f"llama.cpp's {family.architecture} has no place for {parameter!r}", OTHER_WAY)
            name = name if name.endswith(SUFFIXES) else f"{name}.weight"
            shape = tuple(cut(torch.empty(checkpoint.shape(parameter), device="meta")).shape)

            def read(parameter: str = parameter, cut: Callable[[Tensor], Tensor] = cut) -> Tensor:
                return _changed(parameter, cut(checkpoint[parameter]).float(), config, family)

            yield Planned(name, shape, kind_of(name, shape, wanted), read)


def _parts(parameter: str) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """The names of the matrices in a parameter, and how each is cut out of it."""
    owner, _, last = parameter.rpartition(".")
    if last != PAIRED:
        return [(parameter, lambda weight: weight)]
    return [
        (f"{owner}.{GATE}", lambda weight: weight[:, : weight.shape[1] // 2]),
        (f"{owner}.{UP}", lambda weight: weight[:, weight.shape[1] // 2 :]),
    ]


def _changed(parameter: str, weight: Tensor, config: PreTrainedConfig, family: Family) -> Tensor:
    """A parameter as llama.cpp computes with it."""
    layer = parameter.rpartition(".")[0]
    if family.interleaved and layer.endswith(("q_proj", "k_proj")):
        return interleave(weight, head_width(config))
    return weight + 1 if family.shifted and layer.endswith("norm") else weight


def write(
    path: Path, architecture: str, header: Mapping[str, Any], tensors: Sequence[Planned], progress: Progress
) -> None:
    """Write a GGUF file, one tensor after the other.

    Args:
        path: of the file.
        architecture: llama.cpp's name for it.
        header: keys and values.
        tensors: in their order.
        progress: notified of the bytes.
    """
    with closing(GGUFWriter(path, architecture)) as writer:
        for key, value in header.items():
            _add(writer, key, value)
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, byte_shape(tensor.shape, tensor.kind), np.dtype(np.uint8), tensor.nbytes, tensor.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        progress.start("exporting", sum(tensor.nbytes for tensor in tensors), "B")
        for tensor in tensors:
            writer.write_tensor_data(encode(tensor.name, tensor.read(), tensor.kind))
            progress.step(tensor.nbytes)
        progress.finish()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if not isinstance(value, list):
        adders[type(value)](key, value)
    elif value:
        writer.add_array(key, value)


def check_zeros(path: Path, tensors: Sequence[Planned], progress: Progress) -> tuple[int, int]:
    """Number of exact zeros in the source and in a file, read again.

    Args:
        path: of the file.
        tensors: that were written to it.
        progress: notified of the bytes.

    Raises:
        CheckError: a zero of the source is none in the file, or a tensor is not there as it was written.
    """
    header = read_gguf_header(path)
    before = after = 0
    progress.start("reading again", sum(tensor.nbytes for tensor in tensors), "B")
    for tensor in tensors:
        shape, kind = header.shapes[tensor.name][::-1], Kind(header.kinds[tensor.name])
        if (shape, kind) != (tensor.shape, tensor.kind):
            raise CheckError(f"{tensor.name!r} is {shape} {kind.name} in the file", "report it")
        data = np.fromfile(path, np.uint8, tensor.nbytes, offset=header.starts[tensor.name])
        data = data.reshape(-1, byte_shape(shape, kind)[-1])
        weight = tensor.read().reshape(-1, shape[-1])
        for rows in pieces(shape):
            zeros, kept = weight[rows] == 0, decode(data[rows], kind) == 0
            if lost := int((zeros & ~kept).sum()):
                raise CheckError(f"{lost:,} zeros of {tensor.name!r} are none in the file", "report it")
            before, after = before + int(zeros.sum()), after + int(kept.sum())
        progress.step(tensor.nbytes)
    progress.finish()
    return before, after
