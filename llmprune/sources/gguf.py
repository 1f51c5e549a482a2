"""GGUF files, dequantised once into a folder of safetensors."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.runtime.foreign import reading
from llmprune.sources.bos import added_tokens
from llmprune.sources.cache import make_once
from llmprune.sources.gguf_header import GgufHeader, read_gguf_header
from llmprune.sources.older_readers import add_older_keys

RULES = 4
"""Raised where files that were converted before must be converted anew."""


def cached_gguf(file: Path, cache: Path, progress: Progress) -> Path:
    """The converted folder of a GGUF file, made the first time; another size or date makes another folder."""
    stat = file.stat()
    key = hashlib.sha256(f"{RULES}|{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache / f"{file.stem}-{key}"
    return make_once(folder, (folder / "config.json").exists, lambda new: convert_gguf(file, new, progress), progress)


def check_gguf(file: Path) -> GgufHeader:
    """The header of a GGUF file whose sizes are those of what it holds.

    Raises:
        InputError: the file is no GGUF file, damaged, announces more than is there, or would not compute the same.
    """
    with reading(f"{file} is not a readable GGUF file", "download it again"):
        header = read_gguf_header(file)
        if wrong := header.contradiction():
            raise ValueError(wrong)
    if scaling := header.unread_scaling():
        raise InputError(
            f"{file.name} scales rotary positions ({scaling}), which transformers does not read from GGUF",
            "use the model's safetensors folder instead",
        )
    return header


def convert_gguf(file: Path, folder: Path, progress: Progress) -> None:
    """Dequantise `file` into the new Hugging Face folder `folder`, float32, tokenizer included.

    Raises:
        InputError: transformers cannot read this architecture from GGUF, or the disk cannot hold it.
    """
    header = check_gguf(file)
    weights = header.weights
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
        _convert(file, folder, header)


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


def _convert(file: Path, folder: Path, header: GgufHeader) -> None:
    """Convert a file into an empty folder; transformers is pointed there too, for beside the file may lie others.

    Raises:
        InputError: a tensor is missing, holds NaN or Inf, or transformers cannot read the file.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": str(file.resolve()), "local_files_only": True}
    # Kept in the blocks of the file, weights would be multiplied by a kernel that comes from the Hub.
    plain = getattr(transformers, "GgufConfig", None)
    unpacked = {"quantization_config": plain(dequantize=True)} if plain else {}
    with reading(f"transformers cannot read {file.name}", "use the model's safetensors folder instead"):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **where, **unpacked
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
    if missing := sorted(loaded["missing_keys"]):
        # They were given random values.
        raise InputError(
            f"{file.name} lacks {len(missing)} tensors of {type(model).__name__}, first "
            f"{_gguf_name(missing[0], header)!r}",
            "download it again; a file of several parts has to be joined first",
        )
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"the weights of {name!r} in {file.name} hold NaN or Inf", "use an undamaged file")
    begins = header.values.get("tokenizer.ggml.add_bos_token")
    if isinstance(begins, bool) and begins != bool(added_tokens(tokenizer)):
        tokenizer.add_bos_token = begins  # transformers does not read it
    # The weights are plain floats now; what remains of the source's quantisation would only mislead loaders.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    add_older_keys(folder)


def _gguf_name(parameter: str, header: GgufHeader) -> str:
    """A parameter's name in the file, as far as it is known."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    architecture = header.architecture
    if architecture not in known:
        return parameter
    blocks = int(header.values.get(f"{architecture}.block_count", 0))
    return get_tensor_name_map(known[architecture], blocks).get_name(parameter, (".weight", ".bias")) or parameter
