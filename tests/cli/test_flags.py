"""A flag that is wrong is refused in two lines; help, versions and suggestions."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import REPORT, Outcome, execute, with_value
from helpers import ROOT

from llmprune.cli.flags import build_parser, verify_parser
from llmprune.pruning.methods import METHODS


@pytest.mark.parametrize("spec", ["4:2", "2:0", "0:4", "4:4", "0%", "100%", "150%", "0", "1", "0.0", "1.0", "2"])
def test_a_pattern_that_prunes_nothing_or_everything_is_refused(
    refused: Callable[..., Outcome], flags: list[str], spec: str
) -> None:
    refused(*with_value(flags, "--sparsity", spec), hints="N:M with 0 < N < M")


@pytest.mark.parametrize("spec", ["-0.1", "-1:4", "-50%"])
def test_a_negative_share_is_refused_however_it_is_written(
    refused: Callable[..., Outcome], flags: list[str], spec: str
) -> None:
    refused(*with_value(flags, "--sparsity", spec))
    refused(*flags, f"--sparsity={spec}", hints="N:M with 0 < N < M")


@pytest.mark.parametrize(
    "spec", ["", " ", "half", "2/4", "2:4:8", "2.5:4", "nan", "inf", "50%%", "1e-1", "²:4", "%", ":"]
)
def test_an_unknown_pattern_is_refused(refused: Callable[..., Outcome], flags: list[str], spec: str) -> None:
    refused(*with_value(flags, "--sparsity", spec), hints="N:M with 0 < N < M")


def test_a_pattern_that_does_not_divide_a_width_names_the_layer(
    refused: Callable[..., Outcome], flags: list[str]
) -> None:
    refused(
        *with_value(flags, "--sparsity", "2:5"), says=r"'model\.layers\.0\.self_attn\.q_proj'.*32.*5", hints="--skip"
    )


def test_a_share_that_rounds_to_nothing_is_refused(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*with_value(flags, "--sparsity", "0.001%"), says="rounds to 0")


def test_a_scope_for_n_of_m_is_refused(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*flags, "--scope", "row", says="--scope row does not apply to 2:4")


def test_a_permutation_for_unstructured_sparsity_is_refused(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*with_value(flags, "--sparsity", "50%"), "--permute", says="--permute does not apply to 50%")


def test_a_ridge_for_removals_alone_is_refused(refused: Callable[..., Outcome], flags: list[str]) -> None:
    removal = with_value(flags, "--sparsity", "channels:50%")
    refused(*removal, "--ridge", "0.3", says="--ridge 0.3 does not apply to channels:50%", hints="held-out tokens")


VALUED = sorted(
    option
    for action in build_parser()._actions
    if action.nargs is None and action.option_strings
    for option in action.option_strings
)


@pytest.mark.parametrize("flag", VALUED)
def test_a_flag_without_its_value_is_named(refused: Callable[..., Outcome], flags: list[str], flag: str) -> None:
    refused(*flags, flag, says=f"argument {flag}: expected one argument", hints="--help")


NONSENSE = {
    "--method": ["foo", "", "SparseGPT", "sparse-gpt"],
    "--effort": ["slow", "", "Best"],
    "--targets": ["sparse", ""],
    "--steps": ["0", "-1", "x", "1.5"],
    "--reconstruct": ["-1", "x", "0.5", ""],
    "--ridge": ["-1", "x", "inf", "nan", "30%", ""],
    "--self-calibration": ["-1", "x", "nan", "15%", ""],
    "--allocate": ["alike", ""],
    "--scope": ["column", ""],
    "--samples": ["0", "-1", "1.5", "many", "", "1e3", "99999999999999999999", "١"],
    "--seq-len": ["0", "1", "-8", "8.0", "x"],
    "--seed": ["-1", "0.5", "x", "9" * 30],
    "--eval-windows": ["0", "-1", "x"],
    "--eval-context": ["0", "1", "x"],
    "--dtype": ["int8", "float64", "fp8", ""],
    "--threads": ["0", "-1", "x", "999999999"],
    "--device": ["tpu", "cuda:99", "cuda:-1", "", "meta", "cpu:x"],
    "--calib": ["no/such/file.txt", "c5", "no.safetensors", "/dev/zero"],
    "--eval": ["no/such/file.txt", "c5"],
    "--model": ["no/such/folder", "./none", "none.gguf", "", "a/b/c", "../x", "a b"],
    "--option": ["damping", "=1", "damping=", "=", ""],
    "--only": ["nothing*", ""],
    "--skip": ["nothing*", ""],
}


@pytest.mark.parametrize(
    ("flag", "value"),
    [(flag, value) for flag, values in NONSENSE.items() for value in values],
)
def test_a_bad_value_of_any_flag_is_refused(
    refused: Callable[..., Outcome], flags: list[str], flag: str, value: str
) -> None:
    names_itself = flag not in {"--model", "--calib", "--eval"}
    refused(*flags, f"{flag}={value}", says=flag if names_itself else "")


def test_a_misspelt_choice_gets_a_suggestion(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*flags, "--method", "sparsgpt", says="--method sparsgpt is unknown", hints="did you mean sparsegpt")


def test_refinement_needs_a_window_to_hold_out(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*with_value(flags, "--samples", 1), "--effort", "best", says="there is 1", hints="--reconstruct 0")


@pytest.mark.parametrize("kind", ["error", "owl"])
def test_shares_of_blocks_add_up_and_verify_knows(run: Callable[..., Outcome], flags: list[str], kind: str) -> None:
    sparse = with_value(flags, "--sparsity", "70%")
    assert run(*sparse, "--method", "wanda", "--allocate", kind, "--out", "out", "--no-eval").code == 0
    report = json.loads(Path("out", REPORT).read_text())
    weights = {layer["name"]: layer["shape"][0] * layer["shape"][1] for layer in report["layers"]}
    pruned = sum(layer["pruned"] for layer in report["layers"])
    assert pruned == pytest.approx(0.7 * sum(weights.values()), abs=len(weights) * 64)
    assert len({layer["pattern"] for layer in report["layers"]}) > 1
    assert report["sparsity"]["meaning"] == "70 % unstructured on average, every block with a ratio of its own"
    verified = run("verify", "out")
    assert verified.code == 0
    assert report["sparsity"]["meaning"] in verified.out
    lowest = min((layer["pattern"] for layer in report["layers"]), key=lambda text: float(text.rstrip("%")))
    assert run("verify", "out", "--sparsity", lowest, "--scope", "row").code == 0
    assert run("verify", "out", "--sparsity", "70%", "--scope", "row").code == 1


def test_shares_of_blocks_are_for_unstructured_patterns(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*flags, "--allocate", "error", says="--allocate error does not apply to 2:4", hints="every group")


def test_a_misspelt_flag_gets_a_suggestion(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*flags, "--sample", "4", says="'--sample'", hints="--samples")


def test_an_unknown_flag_or_a_stray_word_is_refused(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*flags, "--xyzzy", says="'--xyzzy'", hints="--help")
    refused(*flags, "tiny", says="'tiny'", hints="--help")


@pytest.mark.parametrize("arguments", [[], ["--model", "demo"], ["--sparsity", "2:4"], ["verify"]])
def test_a_missing_flag_is_named(refused: Callable[..., Outcome], arguments: list[str]) -> None:
    refused(*arguments, says="required: ", hints="--help")


def test_globs_that_match_nothing_show_a_name_that_exists(refused: Callable[..., Outcome], flags: list[str]) -> None:
    for flag in ("--only", "--skip"):
        refused(*flags, flag, "*.w1", says=r"'\*\.w1' matches none of 14 layers", hints=r"model\.layers\.0\.")
    refused(*flags, "--skip", "*", says="no layer left")


def test_names_as_in_other_tools_recipes_are_taken(run: Callable[..., Outcome], flags: list[str]) -> None:
    result = run(*flags, "--dry-run", "--json", "--skip", "lm_head", "--skip", "re:.*down_proj", "--skip", "up_proj")
    assert result.code == 0
    assert "--skip 'lm_head' changes nothing: 'lm_head' is no linear layer of a block" in result.err
    assert {layer["name"].rpartition(".")[2] for layer in json.loads(result.out)["layers"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"),
    }


def test_help_lists_every_flag_and_method_without_importing_torch() -> None:
    script = "import sys; from llmprune.cli.main import main; code = main(['--help'])\n"
    script += "print({'torch', 'numpy', 'transformers'} & set(sys.modules), file=sys.stderr); sys.exit(code)"
    done = execute([sys.executable, "-c", script], ROOT)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    for action in build_parser()._actions:
        assert all(option in done.stdout for option in action.option_strings)
    assert all(re.search(rf"^  {name} +\S", done.stdout, re.MULTILINE) for name in METHODS)
    assert all(re.search(rf"^  {code} ", done.stdout, re.MULTILINE) for code in (0, 1, 2, 130))
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_verify_has_help_of_its_own(run: Callable[..., Outcome]) -> None:
    result = run("verify", "--help")
    assert result.code == 0
    assert all(option in result.out for action in verify_parser()._actions for option in action.option_strings)


def test_the_version_is_the_packages(run: Callable[..., Outcome]) -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"', pyproject, re.MULTILINE)
    assert version
    assert run("--version") == (0, f"llmprune {version[1]}\n", "")
