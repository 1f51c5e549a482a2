"""Model sources: a name resolved to a folder of safetensors that can be pruned, or refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.errors import InputError, first_line
from llmprune.progress import Progress
from llmprune.runtime.foreign import check_folder, read_json, reading, user_path
from llmprune.sources.demo import demo_model
from llmprune.sources.gguf import cached_gguf
from llmprune.sources.network import HUB_SECONDS, check_token, hub_reachable, is_unreachable, within

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_WANTED = [
    "*.safetensors",
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "README.md",
]


@dataclass(frozen=True, slots=True)
class Source:
    """A model to prune.

    Args:
        name: as the user gave it.
        folder: of its files.
        revision: the Hub commit, or ''.
        config: its configuration.
    """

    name: str
    folder: Path
    revision: str
    config: PreTrainedConfig


def open_source(name: str, *, revision: str | None, cache: Path, trust_remote_code: bool, progress: Progress) -> Source:
    """Find, download or convert a model; only decoder-only language models with unquantised weights are accepted.

    Raises:
        InputError: it is missing, unreachable, or another kind of model.
    """
    folder, commit = _locate(name, revision, cache, progress)
    check_model_folder(folder)
    return Source(name, folder, commit, _decoder_config(folder, trust_remote_code))


def _locate(name: str, revision: str | None, cache: Path, progress: Progress) -> tuple[Path, str]:
    path = user_path(name)
    if name == "demo" and not path.is_dir():
        return demo_model(cache, progress), ""
    if path.exists() and not path.is_dir():
        if path.suffix.lower() == ".gguf":
            return cached_gguf(path, cache, progress), ""
        raise InputError(
            f"{name} is a file, not a model folder", "--model takes a folder, a Hub id, a .gguf file or demo"
        )
    if path.is_dir():
        return path, ""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) or name.endswith(".gguf"):
        raise InputError(f"there is no folder {name!r}", "--model takes a folder, a Hub id, a .gguf file or demo")
    return download(name, revision, progress)


def download(name: str, revision: str | None, progress: Progress) -> tuple[Path, str]:
    """The local snapshot of a Hub model, and its commit.

    Raises:
        InputError: unreachable (within seconds), gated, missing.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if not hub_reachable():
        return _cached_snapshot(name, revision)
    check_token()
    try:
        info = within(HUB_SECONDS, lambda: HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS))
        if info.gated and not _may_read(name, revision):
            raise InputError(*_gated(name))
        progress.note(f"downloading {name} at {str(info.sha)[:12]} from the Hugging Face Hub")
        folder = snapshot_download(name, revision=info.sha, allow_patterns=_WANTED)
        return Path(folder), str(info.sha)
    except GatedRepoError as error:
        raise InputError(*_gated(name)) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{name} has no revision {revision!r}", "leave out --revision, or name a branch, tag or commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no folder and no Hub model {name!r} (or it is private)",
            "check the spelling; for a private model run `hf auth login` first",
        ) from error
    except HfHubHTTPError as error:
        raise InputError(f"the Hub refused {name}: {first_line(error)}", "try again later") from error
    except Exception as error:
        if is_unreachable(error):
            return _cached_snapshot(name, revision)
        raise


def _gated(name: str) -> tuple[str, str]:
    return (
        f"{name} is gated: its owner wants you to accept terms first",
        f"accept them at https://huggingface.co/{name}, then run `hf auth login` (or set HF_TOKEN)",
    )


def _may_read(name: str, revision: str | None) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        within(HUB_SECONDS, lambda: HfApi().auth_check(name))
    except HfHubHTTPError:
        return False
    return True


def _cached_snapshot(name: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=_WANTED))
    except (LocalEntryNotFoundError, OSError, ValueError) as missing:
        raise InputError(
            f"there is no folder {name!r}, and the Hugging Face Hub cannot be reached",
            "check the path or the network; `--model demo` needs the Python package index only",
        ) from missing
    return folder, folder.name


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
    """The config of a decoder-only language model with unquantised weights."""
    raw = _config_file(folder)
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method", key) if isinstance(raw[key], dict) else key
            raise InputError(
                f"the model is already quantised ({method})", "prune the original model, then quantise the result"
            )
    config = read_config(folder, trust_remote_code)
    _refuse_non_decoders(config)
    return config


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
        return read_json(folder / "config.json")


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


def _refuse_non_decoders(config: PreTrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = ""
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder model"
    elif any(hasattr(config, key) for key in ("vision_config", "audio_config", "speech_config")):
        kind = "a multi-modal model"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        kind = "an encoder-only model"
    if kind:
        raise InputError(f"{config.model_type!r} is {kind}", "llmprune prunes decoder-only language models")


def load_tokenizer(source: Source, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        InputError: the folder has none.
    """
    from transformers import AutoTokenizer

    with reading(
        f"{source.folder} has no tokenizer that transformers can load",
        "copy the tokenizer files into the folder, or use ready-made tokens: --calib FILE.safetensors --no-eval",
    ):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    return tokenizer
