"""Model sources: a name resolved to a folder of safetensors that can be pruned, or refused."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.errors import InputError, first_line
from llmprune.progress import Progress
from llmprune.sources.demo import demo_model
from llmprune.sources.gguf import cached_gguf
from llmprune.sources.network import HUB_SECONDS, check_token, hub_reachable, is_unreachable, within

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*", "README.md"]


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
    _refuse_adapters(folder)
    return Source(name, folder, commit, _config(folder, trust_remote_code))


def _locate(name: str, revision: str | None, cache: Path, progress: Progress) -> tuple[Path, str]:
    path = Path(name).expanduser()
    if name == "demo" and not path.is_dir():
        return demo_model(cache, progress), ""
    if path.is_file():
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


def _refuse_adapters(folder: Path) -> None:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise InputError(
            f"{folder} is a PEFT adapter, not a model",
            "merge it into its base model first: PeftModel.merge_and_unload(), then save_pretrained()",
        )
    if not (folder / "config.json").exists():
        raise InputError(
            f"{folder} has no config.json, so it is no model folder", "--model takes a Hugging Face model folder"
        )


def _config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it holds no object")
    except (ValueError, TypeError, OSError) as error:
        raise InputError(
            f"{folder / 'config.json'} cannot be used: {error}", "download or save the model again"
        ) from error
    if "auto_map" in raw and not trust_remote_code and not _is_known(raw.get("model_type")):
        raise InputError(
            f"{folder} needs code of its own to run (model type {raw.get('model_type')!r})",
            "read that code, then add --trust-remote-code if you trust it",
        )
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method", key) if isinstance(raw[key], dict) else key
            raise InputError(
                f"the model is already quantised ({method})", "prune the original model, then quantise the result"
            )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise InputError(
            f"transformers does not understand the config of {folder}: {first_line(error)[:200]}",
            "a newer transformers may know this model type",
        ) from error
    _refuse_non_decoders(config)
    return config


def _is_known(model_type: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


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

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise InputError(
            f"{source.folder} has no tokenizer that transformers can load: {first_line(error)[:200]}",
            "copy the tokenizer files into the folder, or use ready-made tokens: --calib FILE.safetensors --no-eval",
        ) from error
    return tokenizer
