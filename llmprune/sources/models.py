"""Model sources: a name resolved to a folder of safetensors that can be pruned, or refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.errors import InputError, first_line
from llmprune.model.auto_class import auto_class
from llmprune.model.dequantize import dequantized
from llmprune.model.quantization import Quantization, quantization_of
from llmprune.model.reader import Entry, HeadersOnly, SafetensorsFolder
from llmprune.progress import Progress
from llmprune.runtime.foreign import check_folder, muted, read_json, reading, user_path
from llmprune.runtime.redact import HUB_ID
from llmprune.sources.demo import demo_model
from llmprune.sources.gguf import cached_gguf
from llmprune.sources.hub import Request, fetch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DEQUANTIZED = torch.bfloat16
"""The dtype of what was stored in fewer bits, where none is asked for."""
MOST_OF_A_KIND = 2**14
_COUNT = re.compile(r"(layers?|blocks?|heads?|experts?|labels|codebooks|groups|depth)$")


@dataclass(frozen=True, slots=True)
class Source:
    """A model to prune.

    Args:
        name: as the user gave it.
        folder: of its files.
        revision: the Hub commit, or ''.
        config: its configuration.
        entries: its tensors, where the files of the weights are still on the Hub; None where they are in the folder.
        quantization: how its weights are stored in fewer bits; None where they are plain.
    """

    name: str
    folder: Path
    revision: str
    config: PreTrainedConfig
    entries: Mapping[str, Entry] | None = None
    quantization: Quantization | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that its config names; None where it names none."""
        found = self.config.dtype or self.config.get_text_config().dtype
        return found if isinstance(found, torch.dtype) else None

    def weights(self, dtype: torch.dtype | None = None) -> SafetensorsFolder:
        """Its tensors, in floating point.

        Args:
            dtype: of those that are stored in fewer bits, and dequantised when they are read; None for bfloat16.

        Raises:
            InputError: a file is damaged, or there is none; quantised values and their scales disagree.
        """
        raw = SafetensorsFolder(self.folder) if self.entries is None else HeadersOnly(self.folder, self.entries)
        return dequantized(raw, self.quantization, dtype or DEQUANTIZED) if self.quantization else raw


def open_source(
    name: str,
    *,
    revision: str | None,
    cache: Path,
    trust_remote_code: bool,
    progress: Progress,
    headers_only: bool = False,
) -> Source:
    """Find, download or convert a decoder-only language model whose weights can be had in floating point.

    Args:
        name: a folder, a Hub id, a GGUF file, or `demo`.
        revision: of a Hub model.
        cache: of converted models.
        trust_remote_code: whether code that comes with the model may run.
        progress: told what is done.
        headers_only: whether of weights on the Hub the headers suffice.

    Raises:
        InputError: it is missing, unreachable, or another kind of model.
    """

    def config_of(folder: Path) -> PreTrainedConfig:
        return _decoder_config(folder, trust_remote_code)

    folder = _local(name, cache, progress)
    if folder is not None:
        return Source(name, folder, "", config_of(folder), None, stored_form(folder))
    found = fetch(Request(name, revision, config_of, headers_only), progress)
    config, form = config_of(found.folder), stored_form(found.folder)
    return Source(name, found.folder, found.commit, config, found.entries, form)


def _local(name: str, cache: Path, progress: Progress) -> Path | None:
    """The folder of a model that is on this machine, or made here; None for a Hub id.

    Raises:
        InputError: it is neither.
    """
    path = user_path(name)
    if name == "demo" and not path.is_dir():
        return demo_model(cache, progress)
    if path.exists() and not path.is_dir():
        if path.suffix.lower() == ".gguf":
            return cached_gguf(path, cache, progress)
        raise InputError(
            f"{name} is a file, not a model folder", "--model takes a folder, a Hub id, a .gguf file or demo"
        )
    if path.is_dir():
        return path
    if not HUB_ID.fullmatch(name) or name.endswith(".gguf"):
        raise InputError(f"there is no folder {name!r}", "--model takes a folder, a Hub id, a .gguf file or demo")
    return None


def check_model_folder(folder: Path) -> None:
    """Check what may be read of a model folder, before anything is.

    Raises:
        InputError: it is none, has files that are not to be read, or an adapter, which loaders would apply.
    """
    check_folder(folder)
    if (folder / "adapter_config.json").exists():
        what = "a model with a PEFT adapter beside it" if (folder / "config.json").exists() else "a PEFT adapter"
        raise InputError(
            f"{folder} is {what}, not a model",
            "merge it into its base model first: PeftModel.merge_and_unload(), then save_pretrained()",
        )
    if not (folder / "config.json").exists():
        raise InputError(
            f"{folder} has no config.json, so it is no model folder", "--model takes a Hugging Face model folder"
        )


def _decoder_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a decoder-only language model with plain weights, or with such as can be dequantised.

    Nothing else of the folder is needed.
    """
    stored_form(folder)
    config = read_config(folder, trust_remote_code)
    refuse_non_decoders(config)
    # The weights are plain floats when they are read.
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    return config


def stored_form(folder: Path) -> Quantization | None:
    """How the weights of a model folder are stored in fewer bits; None where they are plain.

    Raises:
        InputError: in a form from which the original weights cannot be had back.
    """
    check_model_folder(folder)
    return quantization_of(_config_file(folder))


def read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a model folder.

    Raises:
        InputError: it is no such folder, has files that are not to be read, or needs code of its own that must not run.
    """
    from transformers import AutoConfig

    check_model_folder(folder)
    if not trust_remote_code and (code := _code_of(_config_file(folder))):
        raise InputError(
            f"{folder} needs code of its own to run ({code})",
            "read that code, then add --trust-remote-code if you trust it",
        )
    with reading(
        f"transformers does not understand the config of {folder}", "a newer transformers may know this model type"
    ):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    return config


def _config_file(folder: Path) -> dict[str, Any]:
    with reading(f"{folder / 'config.json'} cannot be used", "download or save the model again"):
        raw = read_json(folder / "config.json")
        if wrong := _too_many(raw):
            raise ValueError(wrong)
    return raw


def _too_many(value: Any, key: str = "") -> str:
    """The first setting, at any depth, that asks for too many of something; configs make lists as long as it says."""
    if isinstance(value, dict):
        return next(filter(None, (_too_many(item, name) for name, item in value.items())), "")
    if isinstance(value, list):
        return next(filter(None, (_too_many(item, key) for item in value)), "")
    if isinstance(value, int | float) and value > MOST_OF_A_KIND and _COUNT.search(key):
        return f"{key} is {str(value)[:40]}, the most are {MOST_OF_A_KIND:,}"
    return ""


def _code_of(config: Any) -> str:
    """What in a config file asks for code that is no part of transformers, or ''."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if not isinstance(config, dict):
        return ""
    kind = config.get("model_type")
    if "auto_map" in config and not (isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES):
        return f"model type {kind!r}"
    # A name with a slash is a kernel on the Hub.
    kernels = [config.get(key) for key in ("attn_implementation", "_attn_implementation", "experts_implementation")]
    kernels += [inner for kernel in kernels if isinstance(kernel, dict) for inner in kernel.values()]
    if kernel := next((kernel for kernel in kernels if isinstance(kernel, str) and "/" in kernel), ""):
        return f"kernel {kernel!r}"
    return next(filter(None, map(_code_of, config.values())), "")


def refuse_non_decoders(config: PreTrainedConfig) -> None:
    """Refuse the config of a model that has no decoder-only language model.

    Raises:
        InputError: what it is instead.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind, known = "", auto_class(config)
    try:
        tower = config.get_text_config() if known else config
    except ValueError as error:
        raise InputError(
            f"{config.model_type!r} holds several language models: {first_line(error)}",
            "llmprune prunes models of one; save the one to prune as a model of its own",
        ) from error
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, tower)):
        kind = "an encoder-decoder model"
    elif not known and any(hasattr(config, key) for key in ("vision_config", "audio_config", "speech_config")):
        kind = "a multi-modal model without a language model for text and images"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        kind = "an encoder-only model"
    elif known and not hasattr(tower, "vocab_size"):
        kind = "a model whose config names no vocabulary"
    if kind:
        raise InputError(f"{config.model_type!r} is {kind}", "llmprune prunes decoder-only language models")
    if not known:
        raise InputError(
            f"model type {config.model_type!r} cannot be built as a causal language model",
            "llmprune prunes decoder-only language models; remote code needs --trust-remote-code",
        )


def load_tokenizer(source: Source, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        InputError: the folder has none.
    """
    from transformers import AutoTokenizer

    with (
        reading(
            f"{source.folder} has no tokenizer that transformers can load",
            "copy the tokenizer files into the folder, or use ready-made tokens: --calib FILE.safetensors --no-eval",
        ),
        muted(),
    ):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        # Settings of a wrong type are found out when it is used.
        tokenizer.decode(tokenizer("a text", verbose=False)["input_ids"])
    return tokenizer
