"""What is tried and is not there is answered with what there is."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import REPORT, Outcome

from llmprune.cli.flags import build_parser
from llmprune.cli.guesses import ANSWERS, COMMANDS
from llmprune.cli.main import main
from llmprune.cli.shell import guarded, run_command
from llmprune.errors import InputError
from llmprune.job import knobs
from llmprune.knobs import Knob, flag_of
from llmprune.runtime.process_group import PeerFailedError

FLAGS = {
    "--pattern 2:4": "use --sparsity 2:4",
    "--ratio 0.5": "use --sparsity 0.5",
    "--ratio=0.5": "use --sparsity 0.5",
    "--output x": "use --out x",
    "--output-dir x": "use --out x",
    "--output_dir x": "use --out x",
    "-m demo": "use --model demo",
    "-o x": "use --out x",
    "--nsamples 64": "use --samples 64",
    "--dataset c4": "use --calib c4",
    "--data my.txt": "use --calib my.txt",
    "--save": "use --out DIR",
    "--save --overwrite": "use --out DIR",
    "--ignore *.q_proj": "use --skip '*.q_proj'",
    "--verbose": "progress is shown already",
    "-v": "progress is shown already",
    "--force": "use --overwrite",
    "--gpu 0": "use --device cuda",
    "--bf16": "use --dtype bfloat16",
    "--skip-eval": "use --no-eval",
    "--seq_len 64": "did you mean --seq-len?",
    "--quite": "did you mean --quiet?",
    "--dryrun": "did you mean --dry-run?",
    "--resume": "leave it out",
    "--xyzzy": "see llmprune --help",
}


@pytest.mark.parametrize("typed", FLAGS)
def test_a_flag_that_there_is_not_is_answered_with_the_one_that_is_meant(
    refused: Callable[..., Outcome], typed: str
) -> None:
    flag = re.split("[ =]", typed)[0]
    wanted = f"^hint: {re.escape(FLAGS[typed])}"
    for before in ([], ["--model", "demo"], ["--model", "demo", "--sparsity", "2:4", "--quiet"]):
        refused(*before, *typed.split(" "), says=f"^error: unknown argument '{flag}'$", hints=wanted)


@pytest.mark.parametrize("each", knobs(), ids=lambda each: each.name)
def test_every_name_that_a_knob_has_elsewhere_is_answered(refused: Callable[..., Outcome], each: Knob) -> None:
    for guess in each.guesses:
        name, _, value = guess.partition("=")
        if flag_of(name) == each.flag:
            continue
        given = "" if each.is_switch else f" {value or 'x'}"
        refused(flag_of(name), "x", says=f"unknown argument '{flag_of(name)}'", hints=f"^hint: use {each.flag}{given}$")


def test_answers_name_flags_that_there_are() -> None:
    known = build_parser()._option_string_actions
    for flag, answer in ANSWERS.items():
        assert flag not in known
        assert set(re.findall(r"--[a-z][a-z-]+", answer)) <= known.keys()


WORDS = {
    "prune": "llmprune --model MODEL --sparsity 2:4$",
    "prune --model demo --sparsity 2:4": "llmprune --model demo --sparsity 2:4$",
    "Prune": "pruning needs no such word",
    "info": "--dry-run.*llmprune verify DIR",
    "help": "^hint: llmprune --help$",
    "version": "^hint: llmprune --version$",
    "quantise": "llmprune quantize DIR int4",
    "convert": "^hint: llmprune export DIR gguf$",
    "verfy": "did you mean llmprune verify DIR",
    "verfy out --json": "did you mean llmprune verify out --json",
    "upload": "llmprune push DIR ORG/NAME",
    "demo": "^hint: llmprune --model demo --sparsity 2:4$",
    "meta-llama/Llama-3.2-1B": "^hint: llmprune --model meta-llama/Llama-3.2-1B --sparsity 2:4$",
    "2:4": "^hint: use --sparsity 2:4$",
    "channels:25%": "^hint: use --sparsity channels:25%$",
    "xyzzy": ", ".join(COMMANDS),
}


@pytest.mark.parametrize("typed", WORDS)
def test_a_word_where_a_command_is_expected_is_named_and_answered(refused: Callable[..., Outcome], typed: str) -> None:
    word, *rest = typed.split(" ")
    refused(word, *rest, says=f"^error: '{re.escape(word)}' is no command$", hints=WORDS[typed])


def test_a_folder_is_answered_with_what_can_be_done_with_it(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    refused(tmp_path, hints=rf"^hint: llmprune --model {tmp_path} --sparsity 2:4$")
    (tmp_path / REPORT).write_text("{}")
    refused(tmp_path, hints=rf"^hint: llmprune verify {tmp_path}$")


def test_a_stray_word_is_answered_before_what_is_missing(refused: Callable[..., Outcome]) -> None:
    refused("--model", "demo", "2:4", says="unknown argument '2:4'", hints="use --sparsity 2:4")
    refused("--json", "demo", says="unknown argument 'demo'", hints="--model demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_other_commands_answer_a_misspelt_flag(refused: Callable[..., Outcome], command: str) -> None:
    refused(command, "x", "--debgu", says="'--debgu'", hints="did you mean --debug?")


@pytest.mark.parametrize("value", ["-1", "-.5", "--help", "a b", "-a b"])
def test_the_value_of_a_flag_is_not_taken_for_a_flag(value: str) -> None:
    parser = build_parser()
    assert parser.present(["--model", value, "--json"]) == ["--model", value, "--json"]


def test_what_stands_behind_two_dashes_is_left_alone() -> None:
    assert build_parser().present(["--json", "--", "--xyzzy", "prune"]) == ["--json", "--", "--xyzzy", "prune"]


@pytest.mark.parametrize(
    ("sparsity", "hint"), [("50", "for 50 % use 50%"), ("12.5", "use 12.5%"), ("channels:25", "%")]
)
def test_a_number_of_percent_is_offered_its_sign(refused: Callable[..., Outcome], sparsity: str, hint: str) -> None:
    refused("--model", "x", "--sparsity", sparsity, hints=hint)


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the second process of a run."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("typed", ["--xyzzy", "prune", "--model demo", "--model m --sparsity 2:4 --own=-1"])
def test_what_is_wrong_for_all_processes_is_said_by_the_first(capsys: pytest.CaptureFixture[str], typed: str) -> None:
    assert main(typed.split(" ")) == 2
    assert capsys.readouterr() == ("", "")


def test_an_error_that_another_process_has_printed_is_not_printed_again(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> int:
        raise error

    printed = PeerFailedError("another process has ended")
    printed.silent = True
    assert guarded(lambda: fail(printed), debug=False) == 1
    assert capsys.readouterr() == ("", "")
    assert guarded(lambda: fail(PeerFailedError("another process has ended")), debug=False) == 1
    assert capsys.readouterr().err == "error: another process has ended\n"
    assert guarded(lambda: fail(InputError("this is wrong", "do that")), debug=False) == 2
    assert capsys.readouterr().err == "error: this is wrong\nhint: do that\n"


def test_an_interruption_says_of_the_output_only_what_is_so(capsys: pytest.CaptureFixture[str]) -> None:
    from eval import speed
    from llmprune.cli import flags

    def stop(*_: object) -> int:
        raise KeyboardInterrupt

    folders = ["some", "other"]
    for parser, words, said in (
        (build_parser(), ["--model", "demo", "--sparsity", "2:4"], "interrupted; the output folder is as it was"),
        (flags.pack_parser(), folders[:1], "interrupted; the output folder is as it was"),
        (flags.verify_parser(), folders[:1], "interrupted"),
        (speed.build_parser(), folders, "interrupted"),
    ):
        assert run_command(parser, stop, words) == 130
        assert capsys.readouterr().err == f"\n{said}\n"


def test_a_parser_without_knobs_takes_words(capsys: pytest.CaptureFixture[str]) -> None:
    from llmprune.cli.flags import verify_parser

    found: list[argparse.Namespace] = []
    assert run_command(verify_parser(), lambda options: found.append(options) or 0, ["some/folder", "--json"]) == 0  # type: ignore[func-returns-value]
    assert found[0].dir == Path("some/folder")
    assert capsys.readouterr() == ("", "")
