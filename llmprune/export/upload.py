"""Upload of a pruned folder to the Hugging Face Hub; all that can be checked is checked before a run."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from llmprune.errors import InputError, PruneError, first_line
from llmprune.export.pack import check_regular, warn_of_left_out
from llmprune.model.companions import copy_json
from llmprune.model.reader import PACKED
from llmprune.progress import Progress
from llmprune.reporting.model_card import card_for
from llmprune.reporting.report import PruneReport
from llmprune.runtime.ownership import regular_files
from llmprune.runtime.redact import without_origins, without_secrets
from llmprune.sources.network import HUB_SECONDS, check_token, hub_reachable, is_unreachable, start_probe, within

CARD = "README.md"
WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Destination:
    """A repository and branch on the Hub.

    Args:
        repo: `ORG/NAME`; created if it does not exist.
        private: whether only its owners may see it.
        revision: branch to write to, created if it does not exist; None for the main one.
    """

    repo: str
    private: bool = False
    revision: str | None = None

    def command(self, folder: Path) -> str:
        """The command line that uploads a folder to it."""
        flags = ["--private"] if self.private else []
        flags += ["--hub-revision", self.revision] if self.revision else []
        return shlex.join(["llmprune", "push", str(folder), self.repo, *flags])


def push(
    folder: Path, repo: str, *, private: bool = False, revision: str | None = None, progress: Progress | None = None
) -> str:
    """Upload a pruned folder to the Hugging Face Hub, in one commit where it has no more than a few hundred files.

    The token is that of `hf auth login` or `HF_TOKEN`. Weights of an earlier upload that this one does not replace are
    deleted from the branch (its history keeps them): a loader would mix them with the new ones. The folder is
    not changed; the uploaded card names the repository where that of the folder names the folder.

    Args:
        folder: as `prune` wrote it.
        repo, private, revision: see `Destination`.
        progress: notified of the steps.

    Returns:
        The address of the commit.

    Raises:
        InputError: it cannot be done; found within seconds, nothing was sent.
        PruneError: the upload failed; the folder is unchanged.
    """
    where = Destination(repo, private, revision)
    report = check_folder(folder)
    start_probe()  # what an earlier call found may be over
    check_destination(where, report.model["name"])
    return upload(folder, where, progress or Progress())


def check_destination(where: Destination, model: str) -> None:
    """Check, within seconds, whether an upload can succeed, as far as the Hub tells.

    Args:
        where: the destination.
        model: the dense model, which must not be overwritten.

    Raises:
        InputError: an invalid name, no token, no connection, no permission, a public repository where
            a private one is asked for.
    """
    _check_names(where, model)
    if get_token() is None:
        raise InputError(f"there is no Hub token to write to {where.repo} with", "run `hf auth login`, or set HF_TOKEN")
    check_token()
    if not hub_reachable():
        raise InputError(*_unreachable())
    try:
        within(2 * HUB_SECONDS, lambda: _check_rights(where))
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise InputError(
                "the Hub does not accept your token", "make a new one with write access, then run `hf auth login`"
            ) from error
        raise InputError(f"the Hub refused {where.repo}: {_reason(error)}", "try again later") from error
    except Exception as error:
        if is_unreachable(error):
            raise InputError(*_unreachable()) from error
        raise


def _check_names(where: Destination, model: str) -> None:
    try:
        validate_repo_id(where.repo)
        if "/" not in where.repo:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise InputError(
            f"{where.repo!r} is no name on the Hub: {first_line(error)}", "use ORG/NAME, such as you/tiny-2of4"
        ) from error
    branch = where.revision or "main"
    if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)*", branch) or ".." in branch or branch.endswith((".lock", ".")):
        raise InputError(f"{branch!r} is no name for a branch", "use letters, digits, -, _, . and /")
    if re.fullmatch(r"[0-9a-f]{40}", branch):
        raise InputError(f"{branch} is a commit, which cannot be written to", "name a branch")
    if where.repo.lower() == model.lower() and branch == "main":
        raise InputError(
            f"{where.repo} is the dense model itself", "choose another name, or another branch (--hub-revision)"
        )


def _check_rights(where: Destination) -> None:
    api = HfApi()
    who = api.whoami()
    user = who.get("name")
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(
            f"the Hub token of {user} may only read", "make one with write access, then run `hf auth login`"
        )
    try:
        api.auth_check(where.repo, write=True)
        public = api.model_info(where.repo, timeout=HUB_SECONDS).private is False
    except RepositoryNotFoundError:
        _check_namespace(where.repo, who)
        return
    except HfHubHTTPError as error:
        if error.response.status_code == 403:
            raise InputError(
                f"{user} may not write to {where.repo}", "choose another name, or ask its owner"
            ) from error
        raise
    if where.private and public:
        raise InputError(
            f"{where.repo} exists and is public, but --private was asked for",
            "make it private in its settings on the Hub, or choose another name",
        )


def _check_namespace(repo: str, who: dict[str, Any]) -> None:
    """Check that the user may create a repository of this owner.

    Raises:
        InputError: the user may not.
    """
    roles = {org["name"].lower(): org.get("roleInOrg") for org in who.get("orgs", [])}
    roles[str(who.get("name")).lower()] = "admin"
    owner = repo.partition("/")[0]
    if owner.lower() not in roles:
        raise InputError(
            f"{who.get('name')} is no member of {owner}, so {repo} cannot be made",
            f"choose a name that begins with one of {', '.join(sorted(f'{name}/' for name in roles))}",
        )
    if roles[owner.lower()] == "read":
        raise InputError(f"{who.get('name')} may only read in {owner}", "choose another owner, or ask for write access")


def upload(folder: Path, where: Destination, progress: Progress) -> str:
    """Upload a folder to a checked destination; returns the address of the commit.

    Raises:
        PruneError: it failed; the folder is unchanged.
    """
    try:
        report = check_folder(folder)
        with _staged(folder, report, where.repo, progress) as stage:
            size = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
            progress.note(f"uploading {size / 2**20:,.1f} MiB to {where.repo}")
            return _send(stage, where, f"{report.model['name']} pruned to {report.sparsity['pattern']} with llmprune")
    except Exception as error:
        raise PruneError(
            f"the upload of {folder} to {where.repo} failed: {_reason(error)}",
            f"nothing is lost; to repeat it without pruning again: {where.command(folder)}",
        ) from error


def _send(stage: Path, where: Destination, message: str) -> str:
    api = HfApi()
    api.create_repo(where.repo, private=where.private or None, exist_ok=True)
    if where.revision and not where.revision.startswith("refs/"):
        api.create_branch(where.repo, branch=where.revision, exist_ok=True)
    there = api.list_repo_files(where.repo, revision=where.revision)
    stale = [name for name in there if name.endswith(WEIGHTS) and "/" not in name and not (stage / name).exists()]
    info = api.upload_folder(
        repo_id=where.repo,
        folder_path=stage,
        revision=where.revision,
        commit_message=message,
        delete_patterns=stale,
    )
    return str(info.commit_url)


@contextmanager
def _staged(folder: Path, report: PruneReport, repo: str, progress: Progress) -> Iterator[Path]:
    """The folder as it is uploaded: links to its regular files, hidden ones left out, and a card for the repository.

    Settings that a later training wrote name no place on this machine.
    """
    regular, others = regular_files(folder)
    warn_of_left_out(others, folder, progress)
    with tempfile.TemporaryDirectory(prefix="llmprune-push-") as name:
        stage = Path(name)
        for path in regular:
            local = path.relative_to(folder)
            if not any(part.startswith(".") for part in local.parts):
                (stage / local).parent.mkdir(parents=True, exist_ok=True)
                if local.name.endswith("config.json"):
                    copy_json(path, stage / local, without_origins)
                else:
                    (stage / local).symlink_to(path.resolve())
        (stage / CARD).unlink(missing_ok=True)
        (stage / CARD).write_text(card_for(folder, report, repo), encoding="utf-8")
        yield stage


def check_folder(folder: Path) -> PruneReport:
    """The report of a folder that can be uploaded.

    Raises:
        InputError: it is missing, or no complete folder that llmprune wrote.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}", "name a folder that llmprune wrote")
    try:
        report = PruneReport.read(folder)
    except InputError as error:
        raise InputError(error.message, "name a folder that llmprune wrote") from error
    for wanted in ("config.json", "*.safetensors"):
        if not any(folder.glob(wanted)):
            raise InputError(f"{folder} has no {wanted}", "the folder is incomplete; prune again")
        check_regular(folder.glob(wanted))
    if any(folder.glob(f"*{PACKED}")):
        raise InputError(f"{folder} is packed, which stock loaders cannot read", f"llmprune unpack {folder}")
    return report


def _unreachable() -> tuple[str, str]:
    return (
        f"the Hugging Face Hub cannot be reached at {constants.ENDPOINT}",
        "check the network and HF_HUB_OFFLINE, or push later",
    )


def _reason(error: BaseException) -> str:
    """The reason of a failure in one line, without secrets, which a server or a proxy may have sent back."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _reason(error.__cause__)  # how the client tells that a large file was refused
    if isinstance(error, HfHubHTTPError):
        text = f"{error.response.status_code}, {error.server_message or error}"
    else:
        text = error.message if isinstance(error, PruneError) else f"{type(error).__name__}: {error}"
    return without_secrets(text.strip().splitlines()[0])
