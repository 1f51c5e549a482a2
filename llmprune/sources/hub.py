"""Models on the Hugging Face Hub: the config first, then the files of one set of weights, or their headers alone."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llmprune.errors import InputError, PruneError, first_line
from llmprune.model.companions import companions
from llmprune.model.reader import INDEX, SINGLE, Entry, SafetensorsFolder, entry_of, first_weights, read_index
from llmprune.progress import Progress
from llmprune.runtime.foreign import TEXT_BYTES
from llmprune.sources.network import HUB_SECONDS, check_token, hub_reachable, is_unreachable, within

CONFIG, CARD = "config.json", "README.md"
AT_ONCE = 8
"""Headers that are asked for at the same time."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is here of a Hub model.

    Args:
        folder: of its files.
        commit: on the Hub.
        entries: its tensors, where of the weights only headers were fetched; None where the files are here.
    """

    folder: Path
    commit: str
    entries: Mapping[str, Entry] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A Hub model that is asked for.

    Args:
        name: `ORG/NAME`.
        revision: branch, tag or commit; None for the main branch.
        check: raises where the config in a folder is not one that can be used.
        headers_only: whether the headers of the weights suffice.
    """

    name: str
    revision: str | None
    check: Callable[[Path], object]
    headers_only: bool = False


def fetch(request: Request, progress: Progress) -> Snapshot:
    """A Hub model: its config, and where that can be used, its weights and all files that come along.

    Raises:
        InputError: unreachable (within seconds), gated, missing, without safetensors; what the check raises.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name = request.name
    if not hub_reachable():
        return _cached(request)
    check_token()
    try:
        return _fetch(request, progress)
    except PruneError:
        raise
    except GatedRepoError as error:
        raise InputError(*_gated(name)) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{name} has no revision {request.revision!r}", "leave out --revision, or name a branch, tag or commit"
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
            return _cached(request)
        raise


def _fetch(request: Request, progress: Progress) -> Snapshot:
    name = request.name
    sizes = _listing(request)
    # By the name of the branch, which is then known without a network too.
    folder = _download(name, request.revision, filter(_tells_the_kind, sizes))
    commit = folder.name
    request.check(folder)
    weights = first_weights(sizes, name)
    along = {file for file in companions(sizes) if sizes[file] <= TEXT_BYTES}
    _download(name, commit, along | ({CARD, weights} & sizes.keys() - {SINGLE}))
    files = {file.name for file in read_index(folder / INDEX).values()} if weights == INDEX else {SINGLE}
    if missing := sorted(files - sizes.keys()):
        raise InputError(f"{name} has no {missing[0]}, which its {INDEX} names", "choose another --revision")
    amount = f"{sum(sizes[file] for file in files) / 2**20:,.0f} MiB"
    if request.headers_only:
        progress.note(f"reading the headers of {name} at {commit[:12]} ({amount}) on the Hugging Face Hub")
        return Snapshot(folder, commit, _headers(name, commit, folder, files))
    progress.note(f"downloading {name} at {commit[:12]} ({amount}) from the Hugging Face Hub")
    _download(name, commit, files)
    return Snapshot(folder, commit)


def _listing(request: Request) -> dict[str, int]:
    """The files of a revision, and their sizes in bytes."""
    from huggingface_hub import HfApi

    info = within(
        HUB_SECONDS,
        lambda: HfApi().model_info(request.name, revision=request.revision, timeout=HUB_SECONDS, files_metadata=True),
    )
    if info.gated and not _may_read(request.name):
        raise InputError(*_gated(request.name))
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _tells_the_kind(file: str) -> bool:
    """Whether a file says, before anything large is fetched, if a model can be pruned."""
    return file in {CONFIG, "adapter_config.json"} or file.endswith(".py")


def _download(name: str, revision: str | None, files: Iterable[str]) -> Path:
    """Fetch files that are not here; returns the folder of the commit, which is named after it."""
    from huggingface_hub import snapshot_download

    exact = sorted(glob.escape(file) for file in files)
    return Path(snapshot_download(name, revision=revision, allow_patterns=exact))


def _headers(name: str, commit: str, folder: Path, files: Iterable[str]) -> dict[str, Entry]:
    """The tensors in files on the Hub, by their headers."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    def header(file: str) -> dict[str, Entry]:
        try:
            found = HfApi().parse_safetensors_file_metadata(name, file, revision=commit).tensors
            return {key: entry_of(folder / file, one.dtype, one.shape, one.data_offsets) for key, one in found.items()}
        except (SafetensorsParsingError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{file} of {name} is not a whole safetensors file: {first_line(error)}", "choose another --revision"
            ) from error

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return {key: entry for entries in pool.map(header, sorted(files)) for key, entry in entries.items()}


def _gated(name: str) -> tuple[str, str]:
    return (
        f"{name} is gated: its owner wants you to accept terms first",
        f"accept them at https://huggingface.co/{name}, then run `hf auth login` (or set HF_TOKEN)",
    )


def _may_read(name: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        within(HUB_SECONDS, lambda: HfApi().auth_check(name))
    except HfHubHTTPError:
        return False
    return True


def _cached(request: Request) -> Snapshot:
    """What an earlier download has left, where it is complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = request.name, request.revision
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[CONFIG]))
    except (LocalEntryNotFoundError, OSError, ValueError) as missing:
        raise _unreachable(name) from missing
    request.check(folder)
    try:
        # Weights are fetched last: where they are, all is.
        SafetensorsFolder(folder)
    except InputError as missing:
        raise _unreachable(name) from missing
    return Snapshot(folder, folder.name)


def _unreachable(name: str) -> InputError:
    return InputError(
        f"there is no folder {name!r}, and the Hugging Face Hub cannot be reached",
        "check the path or the network; `--model demo` needs the Python package index only",
    )
