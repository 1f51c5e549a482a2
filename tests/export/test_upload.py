"""What was pruned loads from the Hub by its name there; what goes wrong on the way costs seconds, not the work."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import ROOT, random_tokens, reload
from hub_server import TOKEN, Hub, environment
from huggingface_hub import ModelCard, constants

from llmprune import Job, PruneError, prune, push
from llmprune.cli.main import main
from llmprune.errors import InputError
from llmprune.export.upload import Destination

REPO = "me/tiny-2of4"
Outcome = namedtuple("Outcome", "code out err")


@pytest.fixture(scope="module")
def pruned(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned folder in several files, with its perplexities."""
    out = tmp_path_factory.mktemp("pruned") / "tiny-pruned"
    small = {"samples": 4, "seq_len": 32, "eval_windows": 3, "eval_context": 32, "max_shard_size": "40kB"}
    prune(
        Job(str(tiny), "2:4", "wanda", calib=str(text), eval_text=str(text), out=out, command="llmprune ...", **small)
    )  # type: ignore[arg-type]
    return out


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line; the token may stand nowhere in what it says."""

    def call(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        found = Outcome(code, *capfd.readouterr())
        assert TOKEN not in found.out + found.err
        return found

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# An upload


def test_what_is_pushed_is_what_was_pruned_under_its_new_name(hub: Hub, pruned: Path) -> None:
    before = contents(pruned)
    address = push(pruned, REPO)
    assert address.startswith(f"{hub.url}/{REPO}/commit/")
    assert contents(pruned) == before
    files = hub.files(REPO)
    card = files.pop("README.md").decode()
    del files[".gitattributes"]
    assert files == {name: data for name, data in before.items() if name != "README.md"}
    assert card.count(f'from_pretrained("{REPO}")') == 2
    assert "tiny-pruned" not in card.partition("## How it was made")[0]
    assert ModelCard(card).data.model_name == "tiny-2of4"
    assert not any(TOKEN.encode() in data for data in hub.files(REPO).values())


def test_settings_of_a_later_training_name_no_place_on_this_machine(hub: Hub, pruned: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pruned, tmp_path / "trained")
    config = json.loads((copy / "config.json").read_text())
    for origin, wanted in (
        ("/home/ada/secret/tiny", "tiny"),
        ("../x/tiny", "tiny"),
        ("..", ""),
        ("org/tiny", "org/tiny"),
    ):
        (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": origin}))
        push(copy, REPO)
        assert json.loads(hub.files(REPO)["config.json"]) == {**config, "_name_or_path": wanted}


def test_a_branch_and_a_private_repository_are_made_when_asked_for(hub: Hub, pruned: Path) -> None:
    push(pruned, "team/tiny", private=True, revision="v1/first")
    assert hub.repos["team/tiny"].private
    assert list(hub.files("team/tiny")) == [".gitattributes"]
    assert "config.json" in hub.files("team/tiny", "v1/first")
    push(pruned, REPO)
    assert not hub.repos[REPO].private


def test_weights_of_an_earlier_upload_do_not_stay_beside_the_new_ones(hub: Hub, pruned: Path) -> None:
    old = {"model.safetensors": b"old", "model-00009-of-00009.safetensors": b"old", "notes.txt": b"mine"}
    hub.add(REPO, {**old, "original/model.safetensors": b"theirs"})
    push(pruned, REPO)
    found = hub.files(REPO)
    assert found.keys() - contents(pruned).keys() == {".gitattributes", "notes.txt", "original/model.safetensors"}
    # History keeps them.
    assert hub.repos[REPO].branches["main"][0][1]["model.safetensors"] == b"old"


def test_an_edited_card_is_uploaded_as_edited_and_hidden_files_stay_at_home(
    hub: Hub, pruned: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "renamed"
    for name, data in contents(pruned).items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(data)
    (copy / "README.md").write_text((copy / "README.md").read_text() + "\nMy own words on tiny-pruned.\n")
    (copy / ".env").write_text("SECRET=1")
    push(copy, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert card.endswith("\nMy own words on tiny-pruned.\n")
    assert f'from_pretrained("{REPO}")' in card
    assert ".env" not in hub.files(REPO)
    (copy / "README.md").unlink()
    push(copy, REPO)
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.eval_results


def test_only_regular_files_of_the_folder_are_uploaded(
    hub: Hub, run: Callable[..., Outcome], pruned: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pruned, tmp_path / "copy"))
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.txt").write_text("SECRET=1")
    (folder / "key.txt").symlink_to(tmp_path / "secrets" / "key.txt")
    (folder / "more").mkdir()
    (folder / "more" / "secrets").symlink_to(tmp_path / "secrets")
    (folder / "inside.json").symlink_to("config.json")
    os.mkfifo(folder / "pipe")
    result = run("push", folder, REPO)
    assert result.code == 0
    assert hub.files(REPO).keys() == {".gitattributes", *contents(pruned)}
    for name in ("key.txt", "more/secrets", "inside.json", "pipe"):
        assert f"warning: left out: {name} is a link or no regular file" in result.err
    weights = next(folder.glob("*.safetensors"))
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    result = run("push", folder, "me/again")
    assert result.code == 2
    assert f"error: {weights} is a link" in result.err
    assert "me/again" not in hub.repos


def test_the_card_tells_the_speed_that_was_measured(hub: Hub, pruned: Path, tmp_path: Path) -> None:
    for name, data in contents(pruned).items():
        (tmp_path / name).write_bytes(data)
    ratio = {"median": 1.5, "low": 1.4, "high": 1.6}
    found = {"dense": {"prefill": 100.0}, "pruned": {"prefill": 150.0}, "speedup": {"prefill": ratio}}
    (tmp_path / "speed.json").write_text(json.dumps({**found, "settings": {"prompt": 512, "threads": None}}))
    push(tmp_path, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert "| prefill, tokens/s | 100.0 | 150.0 | 1.50 (1.40 to 1.60) |" in card
    assert "Measured side by side: prompt 512." in card
    (tmp_path / "speed.json").write_text("[]")
    with pytest.raises(PruneError, match=r"no result of eval\.speed"):
        push(tmp_path, REPO)


def test_the_same_upload_again_changes_nothing(hub: Hub, pruned: Path) -> None:
    push(pruned, REPO)
    files, commits = hub.files(REPO), len(hub.repos[REPO].branches["main"])
    push(pruned, REPO)
    assert hub.files(REPO) == files
    assert len(hub.repos[REPO].branches["main"]) == commits


LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = torch.tensor(json.loads(sys.argv[2]))
print(AutoTokenizer.from_pretrained(sys.argv[1])("w3 w4")["input_ids"])
print(model(input_ids=tokens).logits.double().flatten().tolist())
"""


def test_a_run_pushes_and_plain_transformers_loads_it_by_name_from_a_clean_cache(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    tokens = random_tokens(1, 16)
    with Hub(TOKEN) as server:

        def execute(*command: str) -> subprocess.CompletedProcess[str]:
            variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment(server, tmp_path)}
            done = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, check=False, cwd=tmp_path, env=variables
            )
            assert done.returncode == 0, done.stderr
            assert TOKEN not in done.stdout + done.stderr
            return done

        flags = f"--model {tiny} --sparsity 2:4 --calib {text} --eval {text} --samples 4 --seq-len 32".split()
        flags += ["--eval-windows", "3", "--eval-context", "32", "--out", "out", "--push-to-hub", REPO, "--private"]
        done = execute("-m", "llmprune", *flags, "--effort", "fast")
        assert f"pushed to    {server.url}/{REPO}/commit/" in done.stdout
        loaded = execute("-c", LOAD, REPO, str(tokens.tolist()))
    words, logits = map(json.loads, loaded.stdout.splitlines())
    assert words == [3, 4]
    expected = reload(tmp_path / "out")(input_ids=tokens).logits.detach()
    assert torch.equal(torch.tensor(logits).view_as(expected), expected)
    written = contents(tmp_path / "out")
    assert not any(TOKEN.encode() in data for data in written.values())
    assert REPO in json.loads(written["prune_report.json"])["command"]


# What is found before anything is spent


@pytest.mark.parametrize(
    ("repo", "revision", "says"),
    [
        ("tiny", None, "no name on the Hub"),
        ("a/b/c", None, "no name on the Hub"),
        ("me/ti ny", None, "no name on the Hub"),
        ("me/-tiny", None, "no name on the Hub"),
        ("me/" + "x" * 100, None, "no name on the Hub"),
        (REPO, "a b", "no name for a branch"),
        (REPO, "a..b", "no name for a branch"),
        (REPO, "0" * 40, "is a commit"),
    ],
)
def test_impossible_names_are_refused_without_asking_the_hub(
    hub: Hub, pruned: Path, repo: str, revision: str | None, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        push(pruned, repo, revision=revision)
    assert hub.requests == []


def test_the_dense_model_is_never_overwritten(hub: Hub, pruned: Path, tmp_path: Path) -> None:
    for name, data in contents(pruned).items():
        (tmp_path / name).write_bytes(data)
    report = json.loads((tmp_path / "prune_report.json").read_text())
    report["model"]["name"] = "Me/Tiny"
    (tmp_path / "prune_report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="the dense model itself"):
        push(tmp_path, "me/tiny")
    push(tmp_path, "me/tiny", revision="pruned")


FLAWS: dict[str, tuple[Callable[[Hub], object], str, str, str]] = {
    "no token": (lambda _: os.environ.pop("HF_TOKEN"), REPO, "there is no Hub token", "hf auth login"),
    "wrong token": (lambda hub: setattr(hub, "token", "other"), REPO, "does not accept your token", "hf auth login"),
    "no token's letters": (
        lambda _: os.environ.update(HF_TOKEN="hf_Schlüssel"),
        REPO,
        "token is not valid",
        "HF_TOKEN",
    ),
    "blank in a token": (lambda _: os.environ.update(HF_TOKEN="hf_a b"), REPO, "token is not valid", "HF_TOKEN"),
    "token that reads": (lambda hub: setattr(hub, "role", "read"), REPO, "may only read", "write access"),
    "foreign owner": (lambda _: None, "google/tiny", "me is no member of google", "me/, readers/, team/"),
    "reader": (lambda _: None, "readers/tiny", "me may only read in readers", "write access"),
    "foreign repository": (lambda hub: hub.add("google/x"), "google/x", "may not write", "owner"),
    "public": (lambda hub: hub.add(REPO), REPO, "exists and is public", "settings"),
    "closed": (lambda hub: hub.stop(), REPO, "cannot be reached at http://127", "network"),
    "error": (lambda hub: hub.fail("auth-check", 418, says="teapot"), REPO, "refused me/tiny-2of4: 418, .*teapot", ""),
    "dropped": (lambda hub: hub.fail("whoami", 0), REPO, "cannot be reached", "network"),
}


@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize("command", ["prune", "push"])
def test_what_would_fail_later_is_refused_at_once(
    hub: Hub, run: Callable[..., Outcome], pruned: Path, tiny: Path, tmp_path: Path, flaw: str, command: str
) -> None:
    prepare, repo, says, hints = FLAWS[flaw]
    prepare(hub)
    start, out = time.monotonic(), tmp_path / "out"
    if command == "push":
        result = run("push", pruned, repo, "--private")
    else:
        result = run("--model", tiny, "--sparsity", "2:4", "--out", out, "--push-to-hub", repo, "--private")
    assert time.monotonic() - start < 5
    assert (result.code, result.out) == (2, "")
    error, hint = result.err.splitlines()[-2:]
    assert re.search(f"^error: .*{says}", error)
    assert re.search(f"^hint: .*{hints}", hint)
    assert not out.exists()
    assert not any("commit" in request for request in hub.requests)


def test_a_dry_run_checks_the_destination_and_sends_nothing(
    hub: Hub, run: Callable[..., Outcome], tiny: Path, text: Path, tmp_path: Path
) -> None:
    flags = ["--model", tiny, "--sparsity", "2:4", "--calib", text, "--no-eval", "--samples", "4", "--seq-len", "32"]
    out = ["--out", tmp_path / "out", "--dry-run"]
    assert run(*flags, *out, "--push-to-hub", REPO).code == 0
    assert run(*flags, *out, "--push-to-hub", "google/x").code == 2
    assert hub.repos == {}
    assert all(request.startswith("GET ") for request in hub.requests)


def test_flags_of_a_push_need_a_push(run: Callable[..., Outcome], tiny: Path) -> None:
    for flags in (["--private"], ["--hub-revision", "x"]):
        result = run("--model", tiny, "--sparsity", "2:4", *flags)
        assert result.code == 2
        assert "means nothing without --push-to-hub" in result.err


def test_only_a_folder_that_llmprune_wrote_is_pushed(
    hub: Hub, run: Callable[..., Outcome], tiny: Path, pruned: Path, tmp_path: Path
) -> None:
    for name in ("prune_report.json", "config.json"):
        (tmp_path / name).write_bytes((pruned / name).read_bytes())
    for folder, says in ((tiny, "prune_report.json"), (tmp_path / "no", "no folder"), (tmp_path, "safetensors")):
        result = run("push", folder, REPO)
        assert (result.code, result.out) == (2, "")
        assert says in result.err
    assert hub.repos == {}


# What fails in mid-upload


@pytest.mark.parametrize(("part", "status"), [("commit", 500), ("commit", 401), ("preupload", 500), ("create", 403)])
def test_a_failed_upload_loses_nothing_and_says_how_to_repeat_it(
    hub: Hub, run: Callable[..., Outcome], tiny: Path, text: Path, tmp_path: Path, part: str, status: int
) -> None:
    hub.fail(f"POST /api/models/{REPO}/{part}" if part != "create" else "repos/create", status, says=f"echo {TOKEN}")
    out = tmp_path / "out"
    small = ["--samples", "4", "--seq-len", "32", "--no-eval", "--effort", "fast", "--json"]
    result = run("--model", tiny, "--sparsity", "2:4", "--calib", text, "--out", out, *small, "--push-to-hub", REPO)
    assert result.code == 1
    assert json.loads(result.out)["out"] == str(out)
    error, hint = result.err.splitlines()[-2:]
    assert re.fullmatch(rf"error: the upload of {out} to {REPO} failed: {status}, echo \*\*\*", error)
    assert hint == f"hint: nothing is lost; to repeat it without pruning again: llmprune push {out} {REPO}"
    assert main(["verify", str(out)]) == 0
    hub.failures.clear()
    assert run(*hint.partition("llmprune ")[2].split()).code == 0
    assert {name: data for name, data in hub.files(REPO).items() if name not in (".gitattributes", "README.md")} == {
        name: data for name, data in contents(out).items() if name != "README.md"
    }


@pytest.mark.parametrize("command", ["prune", "push"])
def test_a_traceback_shows_no_token_that_a_server_repeats(
    hub: Hub, run: Callable[..., Outcome], pruned: Path, tiny: Path, tmp_path: Path, command: str
) -> None:
    other = "hf_" + "x" * 34
    hub.fail("whoami", 418, says=f"echo {TOKEN} and {other} at https://ada:secret@proxy")
    if command == "push":
        result = run("push", pruned, REPO, "--debug")
    else:
        result = run("--model", tiny, "--sparsity", "2:4", "--out", tmp_path / "o", "--push-to-hub", REPO, "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert "echo *** and *** at https://***@proxy" in result.err
    assert other not in result.err
    assert "secret" not in result.err


@pytest.mark.parametrize("status", [0, 500, 503])
def test_what_fails_once_is_tried_again(hub: Hub, pruned: Path, status: int) -> None:
    for part in ("preupload", "commit"):
        hub.fail(f"/{part}/", status, times=1)
    push(pruned, REPO)
    assert "config.json" in hub.files(REPO)


def test_a_dropped_connection_is_a_failed_upload(hub: Hub, pruned: Path) -> None:
    hub.fail("/commit/", 0)
    with pytest.raises(PruneError, match=r"the upload of .* failed") as failure:
        push(pruned, REPO, private=True, revision="b")
    assert failure.value.hint.endswith(f"llmprune push {pruned} {REPO} --private --hub-revision b")
    assert list(hub.files(REPO, "b")) == [".gitattributes"]


# Large files: the Hub's storage

# The client's own call of its HTTP library.
OLD_CALL = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def large(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub that keeps weights in the storage of large files, with a client that sends them by git LFS."""
    hub.large = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return hub


def puts(hub: Hub) -> int:
    return sum(request.startswith("PUT /storage/upload/") for request in hub.requests)


@OLD_CALL
def test_large_files_take_the_way_through_the_storage(large: Hub, pruned: Path) -> None:
    push(pruned, REPO)
    weights = {name: data for name, data in contents(pruned).items() if name.endswith(".safetensors")}
    assert {hashlib.sha256(data).hexdigest(): data for data in weights.values()} == large.objects
    assert weights.items() <= large.files(REPO).items()
    assert puts(large) == len(weights) > 1
    push(pruned, "me/again")
    assert puts(large) == len(weights)


@OLD_CALL
@pytest.mark.parametrize("status", [401, 500, 0])
@pytest.mark.parametrize("part", ["objects/batch", "storage/upload", "storage/verify"])
def test_what_fails_between_two_large_files_is_repeated_without_what_was_sent(
    large: Hub, run: Callable[..., Outcome], pruned: Path, part: str, status: int
) -> None:
    large.fail(part, status, after=0 if part == "objects/batch" else 1)
    result = run("push", pruned, REPO)
    assert result.code == 1
    error, hint = result.err.splitlines()[-2:]
    assert error.startswith(f"error: the upload of {pruned} to {REPO} failed: {status or ''}")
    assert hint == f"hint: nothing is lost; to repeat it without pruning again: llmprune push {pruned} {REPO}"
    assert list(large.files(REPO)) == [".gitattributes"]
    there, large.failures = len(large.objects), []
    assert bool(there) == (part != "objects/batch")
    large.requests.clear()
    assert run(*hint.partition("llmprune ")[2].split()).code == 0
    weights = [name for name in contents(pruned) if name.endswith(".safetensors")]
    assert puts(large) == len(weights) - there
    assert {"config.json", *weights} <= large.files(REPO).keys()


def test_without_a_way_into_the_newer_storage_the_upload_fails_cleanly(hub: Hub, pruned: Path) -> None:
    pytest.importorskip("hf_xet")
    hub.large = True
    hub.fail("xet-write-token", 403)
    with pytest.raises(PruneError, match=r"the upload of .* failed: .*403") as failure:
        push(pruned, REPO)
    assert failure.value.hint.endswith(f"llmprune push {pruned} {REPO}")


def test_an_interrupted_upload_says_how_to_repeat_it(
    hub: Hub, run: Callable[..., Outcome], pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", interrupt)
    result = run("push", pruned, REPO)
    assert result.code == 130
    assert result.err.splitlines()[-1].endswith(f"to repeat it: llmprune push {pruned} {REPO}")


def test_the_command_that_repeats_is_quoted_for_a_shell() -> None:
    assert Destination("a/b").command(Path("my model")) == "llmprune push 'my model' a/b"
