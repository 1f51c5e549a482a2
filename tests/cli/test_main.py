"""What a command prints, and how the process ends."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import REPORT, Outcome, execute, listing, with_value
from helpers import ROOT, save_tiny

from llmprune.cli.terminal import TerminalProgress


def test_the_summary_says_what_was_measured_on_what(run: Callable[..., Outcome], flags: list[str], text: Path) -> None:
    result = run(*flags, "--out", "out")
    assert result.code == 0
    report = json.loads(Path("out", REPORT).read_text())
    dense, pruned = (f"{report['evaluation'][key]['value']:.2f} ±" for key in ("dense", "pruned"))
    assert re.search(rf"^perplexity +dense {dense} \d+\.\d\d, pruned {pruned} \d+\.\d\d$", result.out, re.MULTILINE)
    assert f"{text.name}, 3 windows of 32 tokens" in result.out
    assert f"4 x 32 tokens of {text.name}, seed 0" in result.out
    assert "2:4, prunes 2 of every 4 weights, 50 %" in result.out
    assert "50.00% of" in result.out
    assert "99.2% of 0.0 M block parameters" in result.out
    assert re.search(r"^memory +peak \d", result.out, re.MULTILINE)
    assert re.search(r"^time +\d", result.out, re.MULTILINE)
    assert f'AutoModelForCausalLM.from_pretrained("{Path("out").absolute()}")' in result.out
    assert result.out.splitlines()[-1].startswith("2:4 leaves file size and CPU speed unchanged; ")


def test_what_stays_dense_is_said(run: Callable[..., Outcome], flags: list[str]) -> None:
    result = run(*flags, "--skip", "*.down_proj")
    assert re.search(r"^coverage .*; left dense: --skip 19\.8%$", result.out, re.MULTILINE)


def test_text_in_both_calibration_and_evaluation_is_warned_of(run: Callable[..., Outcome], flags: list[str]) -> None:
    job = with_value(with_value(flags, "--samples", 100), "--seq-len", 40)
    assert "also stands in the calibration text" in run(*job).line("warning: ")


@pytest.mark.parametrize(("method", "tries"), [("magnitude", "--effort balanced"), ("auto", "--effort best")])
def test_an_exploding_perplexity_is_warned_of_with_what_to_try(
    run: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch, method: str, tries: str
) -> None:
    assert "hardly usable" not in run(*flags, "--method", method).err
    monkeypatch.setattr("llmprune.pipeline.report_builder.EXPLODED", 0.1)
    result = run(*flags, "--method", method, "--overwrite")
    warning = result.line("warning: the perplexity rose")
    assert "hardly usable" in warning
    assert f"try {tries}" in warning or f"({tries}" in warning


def test_json_is_one_document_on_stdout_and_equals_the_report(run: Callable[..., Outcome], flags: list[str]) -> None:
    result = run(*flags, "--json")
    assert result.code == 0
    printed, written = json.loads(result.out), json.loads(Path("tiny-balanced-2of4", REPORT).read_text())
    assert printed.pop("out") == str(Path(written.pop("out")).absolute())
    assert printed == written
    assert "perplexity   dense" in result.err


def test_quiet_says_nothing_but_warnings(run: Callable[..., Outcome], flags: list[str]) -> None:
    assert run(*flags, "--quiet", "--out", "out") == (0, "", "")
    report = json.loads(run(*flags, "--quiet", "--json", "--out", "other").out)
    assert report["out"].endswith("other")


def test_quiet_still_warns(run: Callable[..., Outcome], flags: list[str]) -> None:
    warned = run(*with_value(with_value(flags, "--samples", 100), "--seq-len", 40), "--quiet")
    assert warned.out == ""
    assert warned.err == warned.line("warning: ") + "\n"


def test_a_dry_run_shows_the_plan_and_writes_nothing(run: Callable[..., Outcome], flags: list[str]) -> None:
    result = run(*flags, "--dry-run")
    assert result.code == 0
    assert os.listdir() == []
    for key in ("model", "sparsity", "method", "coverage", "calibration", "estimate", "efforts", "size", "would save"):
        assert re.search(rf"^{key} ", result.out, re.MULTILINE), key
    assert result.out.endswith("dry run: nothing was written\n")
    plan = json.loads(run(*flags, "--dry-run", "--json").out)
    assert len(plan["layers"]) == 14
    assert plan["estimate"]["seconds"] > 0
    assert plan["estimate"]["memory"] > 0
    assert plan["size"]["pruned"] == plan["size"]["dense"] > 0
    assert os.listdir() == []


def test_a_local_job_opens_no_connection(
    run: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("socket.create_connection", lambda *arguments, **_: asked.append(arguments))
    assert run(*flags).code == 0
    time.sleep(0.1)
    assert asked == []


def test_the_hub_token_is_in_nothing_that_is_written_or_said(
    run: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_ThisIsASecretThatNobodyMaySee"
    monkeypatch.setenv("HF_TOKEN", secret)
    result = run(*flags, "--json", "--debug", "--out", "out")
    assert result.code == 0
    assert secret not in result.out + result.err
    assert all(secret.encode() not in content for content in listing(Path("out")).values())


def test_options_of_a_method_are_checked_and_reported(
    run: Callable[..., Outcome], refused: Callable[..., Outcome], flags: list[str]
) -> None:
    flags += ["--method", "sparsegpt"]
    refused(*flags, "--option", "damp=0.1", says="sparsegpt has no option 'damp'", hints="damping")
    refused(*flags[:-2], "--method", "wanda", "--option", "damping=0.1", says="wanda has no option")
    for value in ("0", "-1", "x", "nan", "inf"):
        refused(*flags, "--option", f"damping={value}", says=f"damping={value} is no positive")
    assert run(*flags, "--option", "damping=0.5", "--out", "out").code == 0
    assert json.loads(Path("out", REPORT).read_text())["method"]["options"] == {"damping": 0.5}


def test_without_a_terminal_progress_is_plain_lines(run: Callable[..., Outcome], flags: list[str]) -> None:
    result = run(*flags)
    assert "\r" not in result.err
    assert "\x1b" not in result.err
    assert re.search(r"^pruning 1/2  error 0\.\d{4}  \d+ s left$", result.err, re.MULTILINE)
    assert ".tiny-balanced-2of4.partial" in result.err


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make stderr a terminal; what was drawn is in the list afterwards."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    drawn: list[str] = []

    def read() -> None:
        try:
            while chunk := os.read(reader, 4096):
                drawn.append(chunk.decode(errors="replace"))
        except OSError:
            pass  # the other end is closed

    thread = threading.Thread(target=read)
    thread.start()
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield drawn
    thread.join(5)
    os.close(reader)


def test_in_a_terminal_every_stage_has_a_bar(
    run: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(monkeypatch) as drawn:
        result = run(*flags)
    assert result.code == 0
    for stage in ("checking weights", "dense perplexity", "pruning", "verifying", "pruned perplexity"):
        assert re.search(rf"\r{stage} .* left", "".join(drawn)), stage


def test_a_bar_shows_count_figure_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as drawn:
        progress = TerminalProgress()
        progress.start("pruning", 2)
        time.sleep(0.15)
        progress.step(1, "error 0.1234")
        progress.warn("look here")
        progress.finish()
    assert re.search(r"\rpruning +█+ +1/2, error 0\.1234  00:00 left", "".join(drawn))
    assert re.search(r"\r *\rwarning: look here\r\n", "".join(drawn))


def test_a_closed_stdout_ends_quietly(tiny: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "llmprune", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    error = process.stderr.read()
    process.wait(10)
    process.stderr.close()
    assert b"Traceback" not in error


def test_debug_adds_the_traceback(run: Callable[..., Outcome], flags: list[str]) -> None:
    result = run(*with_value(flags, "--sparsity", "4:2"), "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.line("error: ")


def test_what_nobody_foresaw_is_exit_code_1_with_two_lines(
    run: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of some kind")

    monkeypatch.setattr("llmprune.run.verify_written", fail)
    result = run(*flags, "--out", "out")
    assert (result.code, result.out) == (1, "")
    assert result.line("error: ") == "error: ZeroDivisionError: of some kind"
    assert "--debug" in result.line("hint: ")
    assert "2 of 2 blocks are finished and kept" in result.line("warning: ")
    assert os.listdir() == [".out.partial"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    run: Callable[..., Outcome], flags: list[str]
) -> None:
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(*flags, "--seed", seed, "--out", out).code == 0
    a, b, c = (listing(Path(out)) for out in "abc")
    assert [v for k, v in a.items() if k.endswith(".safetensors")] == [
        v for k, v in b.items() if k.endswith(".safetensors")
    ]
    assert [v for k, v in a.items() if k.endswith(".safetensors")] != [
        v for k, v in c.items() if k.endswith(".safetensors")
    ]


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that takes seconds to prune."""
    sizes = {"vocab_size": 100, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 24}
    folder = tmp_path_factory.mktemp("slow") / "slow"
    return save_tiny("llama", folder, max_position_embeddings=512, num_attention_heads=8, **sizes)


@pytest.mark.parametrize(
    ("until", "number", "kept"),
    [("loading libraries", signal.SIGTERM, False), ("pruning 1/24", signal.SIGINT, True)],
)
def test_an_interrupt_ends_at_once_in_one_line_and_keeps_only_finished_blocks(
    slow_model: Path, text: Path, tmp_path: Path, until: str, number: int, kept: bool
) -> None:
    job = ["--model", str(slow_model), "--sparsity", "2:4", "--calib", str(text), "--no-eval", "--out", "out"]
    job += ["--samples", "24", "--seq-len", "128"]
    command = [sys.executable, "-m", "llmprune", *job]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # A shell's background jobs ignore interruptions, and so would what this test starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stderr
        while until not in (line := process.stderr.readline()):
            assert line, "the run ended too early"
        time.sleep(0.3)
        process.send_signal(number)
        sent = time.monotonic()
        rest = process.stderr.read()
        code = process.wait(10)
        took = time.monotonic() - sent
        assert (code, process.stdout.read()) == (130, "")
    assert took < 2
    said = [line for line in rest.splitlines() if line and not line.startswith(("pruning", "checking", "writing"))]
    assert said[-1] == "interrupted; the output folder is as it was"
    assert os.listdir(tmp_path) == ([".out.partial"] if kept else [])
    assert len(said) == 1 + kept
    assert (
        re.match(r"warning: \d+ of 24 blocks are finished and kept in .*\.out\.partial; the same command", said[0])
        or not kept
    )


def test_module_and_script_are_the_same_program(flags: list[str], tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("llmprune")
    for command in ([sys.executable, "-m", "llmprune"], [str(script)]):
        done = execute([*command, "--version"], tmp_path)
        assert (done.returncode, done.stdout[:9], done.stderr) == (0, "llmprune ", "")
        done = execute([*command, "--sparsity"], tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    done = execute([sys.executable, "-m", "llmprune", *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["tiny-balanced-2of4"]
    assert "Warning" not in done.stderr


HUB = """
import contextlib, io, json, os, sys, time
from hub_server import Hub

server = Hub().__enter__()
server.fail("/slow", 0, delay=60)
server.fail("/gated", 401, code="GatedRepo", says="Access to model org/gated is restricted.")
server.fail("listed/auth-check", 403, code="GatedRepo", says="Access to model org/listed is restricted.")
server.add("org/listed", gated="manual")
server.add("org/any")
server.fail("/broken", 500)
os.environ["HF_ENDPOINT"] = server.url
import datasets, llmprune.run
from llmprune.cli.main import main

def case(model, *more):
    out, err, start = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["--model", model, "--sparsity", "2:4", "--out", "out", *more])
    return code, out.getvalue(), err.getvalue(), time.monotonic() - start

found = {name: case(f"org/{name}") for name in ("gated", "listed", "missing", "broken", "slow")}
found["revision"] = case("org/any", "--revision", "gone")
server.stop()
found["closed"] = case("org/any")
tiny, text = sys.argv[1:]
# What libraries take to load for a first model is not the Hub's doing.
assert case(tiny, "--calib", text, "--samples", "2", "--seq-len", "32", "--no-eval", "--dry-run")[0] == 0
found["dataset"] = case(tiny, "--calib", "c4", "--eval-context", "32", "--seq-len", "32")
print(json.dumps(found), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def hub(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str, float]]:
    """What the command line says to the answers of a Hub of our own: code, stdout, stderr, seconds."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "work").mkdir()
    settings = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    done = execute([sys.executable, "-c", HUB, str(tiny), str(text)], folder / "work", **settings)
    assert done.returncode == 0, done.stderr
    assert os.listdir(folder / "work") == []
    found: dict[str, tuple[int, str, str, float]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("case", "says", "hints"),
    [
        ("gated", "org/gated is gated", "hf auth login"),
        ("listed", "org/listed is gated", "hf auth login"),
        ("missing", "no Hub model 'org/missing'", "spelling"),
        ("broken", "refused org/broken", "later"),
        ("slow", "Hugging Face Hub cannot be reached", "network"),
        ("closed", "Hugging Face Hub cannot be reached", "network"),
        ("revision", "no revision 'gone'", "--revision"),
        ("dataset", "data set c4", "network"),
    ],
)
def test_what_the_hub_refuses_is_said_within_five_seconds(
    hub: dict[str, tuple[int, str, str, float]], case: str, says: str, hints: str
) -> None:
    code, out, err, seconds = hub[case]
    assert (code, out) == (2, ""), err
    outcome = Outcome(code, out, err)
    assert re.search(says, outcome.line("error: "))
    assert re.search(hints, outcome.line("hint: "))
    assert "Traceback" not in err
    assert seconds < 5
