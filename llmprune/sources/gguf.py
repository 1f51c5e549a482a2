"""GGUF files, dequantised once into a folder of safetensors."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmprune.errors import InputError, first_line
from llmprune.progress import Progress
from llmprune.sources.cache import make_once


def cached_gguf(file: Path, cache: Path, progress: Progress) -> Path:
    """The converted folder of a GGUF file, made the first time; another size or date makes another folder."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache / f"{file.stem}-{key}"
    return make_once(folder, (folder / "config.json").exists, lambda new: convert_gguf(file, new, progress), progress)


def count_weights(file: Path) -> int:
    """Number of weights in a GGUF file, from its header.

    Raises:
        InputError: the file is no GGUF file.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        return sum(math.prod(int(n) for n in tensor.shape) for tensor in reader.tensors)
    except (ValueError, OSError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as error:
        raise InputError(f"{file} is not a readable GGUF file: {error}", "download it again") from error


def convert_gguf(file: Path, folder: Path, progress: Progress) -> None:
    """Dequantise `file` into the new Hugging Face folder `folder`, float32, tokenizer included.

    Raises:
        InputError: transformers cannot read this architecture from GGUF, or the disk cannot hold it.
    """
    weights = count_weights(file)
    progress.note(
        f"converting {file.name} to safetensors once: {weights / 1e6:.0f} M weights, "
        f"about {4 * weights / 2**30:.1f} GiB on disk and {8 * weights / 2**30:.1f} GiB of memory"
    )
    free = shutil.disk_usage(folder.parent).free
    if free < 4.2 * weights:
        raise InputError(
            f"the converted model needs {4.2 * weights / 2**20:,.0f} MiB, but {folder.parent.parent} has "
            f"{free / 2**20:,.0f} MiB free",
            "free disk space, or choose another --cache-dir",
        )
    folder.mkdir()
    with _bar_replaced(progress):
        _convert(file, folder)


@contextmanager
def _bar_replaced(progress: Progress) -> Iterator[None]:
    """Report dequantisation to `progress` instead of transformers' own bar, which is drawn even into plain files."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def reported(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        progress.start("dequantising", len(tensors))
        for tensor in tensors:
            yield tensor
            progress.step()
        progress.finish()

    bar = reader.tqdm
    reader.tqdm = reported
    try:
        yield
    finally:
        reader.tqdm = bar


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except (ValueError, KeyError, NotImplementedError, OSError, ImportError) as error:
        raise InputError(
            f"transformers cannot read {file.name}: {first_line(error)[:200]}",
            "use the model's safetensors folder instead",
        ) from error
    # The weights are plain floats now; what remains of the source's quantisation would only mislead loaders.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
