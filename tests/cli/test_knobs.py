"""A setting stands in one place: its flag, its field, its checks, its help and its row in the reference agree."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Outcome

import llmprune
from llmprune.cli.flags import build_parser, make_job
from llmprune.errors import InputError
from llmprune.job import ELSEWHERE, GROUPS, Job, knobs, meant
from llmprune.knobs import Knob, flag_of, knob, knobs_of, whole
from llmprune.pruning.recipe import Recipe, Stages

KNOBS = {each.name: each for each in knobs()}


@dataclass(frozen=True, slots=True)
class Seasoned(Job):
    """A job with one more setting."""

    spice: int = knob(3, "data", "how hot it is", whole(1), unit="scoville", guesses=("heat",), earlier=("pepper",))


def parsed(*arguments: str, job: type[Job] = Job) -> Any:
    """The job of a command line."""
    parser = build_parser(job)
    words = ["--model", "m", "--sparsity", "2:4", *arguments]
    return make_job(parser.parse_args(parser.present(words)), words, job)


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_one_more_field_is_a_flag_a_checked_value_a_line_of_help_and_a_row() -> None:
    assert parsed(job=Seasoned).spice == 3
    assert parsed("--spice", "7", job=Seasoned).spice == 7
    assert parsed("--pepper", "7", job=Seasoned).spice == 7
    for refused in (lambda: parsed("--spice", "0", job=Seasoned), lambda: Seasoned("m", "2:4", spice=0)):
        with pytest.raises(InputError, match="--spice 0 is not a whole number of at least 1"):
            refused()
    shown = one_line(build_parser(Seasoned).format_help())
    assert "--spice N how hot it is (default: 3)" in shown
    (row,) = (each for each in knobs(Seasoned) if each.name not in KNOBS)
    told = (row.name, row.flag, row.group, row.help, row.default_text, row.unit, row.range, row.applies_to)
    assert told == ("spice", "--spice", "data", "how hot it is", "3", "scoville", "whole number, at least 1", "")


def test_every_field_that_a_user_sets_is_a_knob() -> None:
    assert KNOBS.keys() == {field.name for field in fields(Job)} - {"command", "asked"}
    assert {each.group for each in KNOBS.values()} == GROUPS.keys()
    assert [each.group for each in knobs()] == sorted((each.group for each in knobs()), key=list(GROUPS).index)


def test_a_name_means_one_knob() -> None:
    names = [
        (flag_of(name.partition("=")[0]), each.name)
        for each in KNOBS.values()
        for name in (each.name, each.flag, *each.earlier, *each.guesses)
    ]
    assert len({name for name, _ in names}) == len(set(names))
    options = build_parser()._option_string_actions
    for each in KNOBS.values():
        assert not {flag_of(name.partition("=")[0]) for name in each.guesses} & options.keys() - {each.flag}


def test_what_a_user_may_set_of_a_recipe_are_its_own_settings() -> None:
    recipe = {each.name: each for each in knobs_of(Recipe)}
    asked = {each.name: each for each in knobs_of(Stages)}
    assert recipe.keys() - asked.keys() == {"method", "criterion", "expert_criterion", "block_criterion", "compensate"}
    for name, each in asked.items():
        assert each.default is None
        assert replace(each, default=recipe[name].default, default_text=recipe[name].default_text) == recipe[name]


@pytest.mark.parametrize("each", KNOBS.values(), ids=KNOBS)
def test_help_has_a_line_for_every_knob(each: Knob) -> None:
    shown = one_line(build_parser().format_help())
    value = "" if each.is_switch else f" {each.metavar}"
    negated = ", --no-[a-z-]+" if each.is_switch and each.default is None else ""
    negation = "do not " if each.flag.startswith("--no-") else ""
    assert re.search(rf"{each.flag}{negated}{re.escape(f'{value} {negation}{each.help}')}", shown)
    if each.default_text and not each.is_switch:
        assert f"default: {each.default_text})" in shown


@pytest.mark.parametrize("each", KNOBS.values(), ids=KNOBS)
def test_a_default_is_a_value_of_its_knob(each: Knob) -> None:
    if each.default is not MISSING:
        assert each.read(each.default) == each.default


VALUES = [
    ("dtype", "bf16", "bfloat16"),
    ("dtype", "BF16", "bfloat16"),
    ("dtype", "fp16", "float16"),
    ("dtype", "half", "float16"),
    ("dtype", "fp32", "float32"),
    ("dtype", "torch.bfloat16", "bfloat16"),
    ("dtype", torch.float16, "float16"),
    ("device", "gpu", "cuda"),
    ("device", "gpu:1", "cuda:1"),
    ("device", "cuda:1", "cuda:1"),
    ("device", torch.device("cpu"), "cpu"),
    ("activation_memory", "512MiB", 2**29),
    ("activation_memory", 0, 0),
    ("samples", "64", 64),
    ("ridge", "0.25", 0.25),
    ("ridge", 1, 1.0),
    ("sparsity", 0.5, "0.5"),
    ("model", Path("a/b"), "a/b"),
    ("out", "a/b", Path("a/b")),
    ("skip", "*.q_proj", ("*.q_proj",)),
    ("skip", ["*.q_proj", "*.k_proj"], ("*.q_proj", "*.k_proj")),
    ("options", {"damping": 0.03}, (("damping", "0.03"),)),
    ("options", [["damping", "0.03"]], (("damping", "0.03"),)),
    ("options", "damping=0.03", (("damping", "0.03"),)),
    ("scope", None, None),
]


@pytest.mark.parametrize(("name", "given", "wanted"), VALUES)
def test_a_value_is_read_however_it_is_written(name: str, given: object, wanted: object) -> None:
    job = Job(**{"model": "m", "sparsity": "2:4", name: given})  # type: ignore[arg-type]
    assert getattr(job, name) == wanted
    assert type(getattr(job, name)) is type(wanted)
    assert replace(job) == job
    if isinstance(given, str):
        assert getattr(parsed(f"{KNOBS[name].flag}={given}"), name) == wanted


REFUSED = [
    ("samples", 0, "--samples 0 is not a whole number of at least 1", "use 1 or more"),
    ("samples", "many", "--samples many is not a whole number of at least 1", "use 1 or more"),
    ("samples", 2**31, f"--samples {2**31} is not a whole number of at least 1 and below {2**31}", "use 1 or more"),
    ("seq_len", 1, "--seq-len 1 is not a whole number of at least 2", "use 2 or more"),
    ("seed", -1, "--seed -1 is not", "use 0 or more"),
    ("reconstruct", -1, "--reconstruct -1 is not", "use 0 or more"),
    ("self_calibration", -0.5, "--self-calibration -0.5 is not a number of at least 0", "such as 0.3"),
    ("ridge", "nan", "--ridge nan is not a number", "such as 0.3"),
    ("ridge", "", "--ridge '' is not a number", "such as 0.3"),
    ("activation_memory", "lots", "--activation-memory lots is no size", "512MiB"),
    ("effort", "bst", "--effort bst is unknown", "choose from fast, balanced, best; did you mean best?"),
    ("method", "SparseGPT", "--method SparseGPT is unknown", "did you mean sparsegpt?"),
    ("targets", "both", "--targets both is unknown", "choose from pruned, dense"),
    ("dtype", "int8", "--dtype int8 is unknown", "choose from float32, float16, bfloat16"),
    ("options", "damping", "--option damping is not of the form KEY=VALUE", "damping=0.03"),
]


@pytest.mark.parametrize(("name", "value", "error", "hint"), REFUSED)
def test_python_and_the_command_line_refuse_a_value_in_the_same_words(
    run: Callable[..., Outcome], name: str, value: object, error: str, hint: str
) -> None:
    with pytest.raises(InputError) as found:
        Job(**{"model": "m", "sparsity": "2:4", name: value})  # type: ignore[arg-type]
    assert found.value.message.startswith(error)
    assert hint in found.value.hint
    result = run("--model", "m", "--sparsity", "2:4", f"{KNOBS[name].flag}={value}")
    assert result == (2, "", f"error: {found.value.message}\nhint: {found.value.hint}\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("samples", value) for value in (True, 1.0, [4])],
        *[("sparsity", value) for value in (None, True, ["2:4"])],
        *[("evaluate", value) for value in (None, 0, "yes")],
        *[("overwrite", value) for value in (None, 1, "yes")],
        *[("seed", None), ("skip", 3), ("skip", [3.5j]), ("out", 5), ("ridge", True), ("activation_memory", True)],
    ],
)
def test_python_values_of_another_type_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^{KNOBS[name].flag} ") as found:
        Job(**{"model": "m", "sparsity": "2:4", name: value})  # type: ignore[arg-type]
    assert found.value.hint


@pytest.mark.parametrize("each", [each for each in KNOBS.values() if each.earlier], ids=lambda each: each.name)
def test_an_earlier_name_is_taken_with_a_warning(each: Knob, capsys: pytest.CaptureFixture[str]) -> None:
    (name,) = each.earlier
    job = Job("m", "2:4", **{each.name: 2})  # type: ignore[arg-type]
    with pytest.warns(DeprecationWarning, match=f"^{name} is now called {each.name}$") as warned:
        assert Job("m", "2:4", **{name: 2}) == job  # type: ignore[arg-type]
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=name):
        assert replace(job, **{name: 3}) == replace(job, **{each.name: 3})  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replace(parsed(flag_of(name), "2"), command="") == job
        assert replace(parsed(f"{flag_of(name)}=2"), command="") == job
    assert capsys.readouterr().err == f"warning: {flag_of(name)} is now called {each.flag}\n" * 2
    assert f"{flag_of(name)} " not in build_parser().format_help()


UNKNOWN = {
    "no_eval": (True, "use evaluate=False"),
    "skip_eval": (True, "use evaluate=False"),
    "pattern": ("2:4", "use sparsity='2:4'"),
    "ratio": (0.5, "use sparsity=0.5"),
    "output": ("x", "use out='x'"),
    "output_dir": ("x", "use out='x'"),
    "nsamples": (64, "use samples=64"),
    "dataset": ("c4", "use calib='c4'"),
    "eval": ("c4", "use eval_text='c4'"),
    "option": (("a", "1"), "use options=('a', '1')"),
    "ignore": (["*.q_proj"], "use skip="),
    "gpu": (True, "use device='cuda'"),
    "efort": ("best", "use effort='best'"),
    "dry_run": (True, ELSEWHERE["dry_run"]),
    "xyzzy": (1, "its fields are model, "),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_field_that_there_is_not_is_answered(name: str) -> None:
    value, answer = UNKNOWN[name]
    with pytest.raises(TypeError, match=re.escape(f"Job has no field {name!r}: {answer}")):
        Job("m", "2:4", **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "field"), [("nsamples", "samples"), ("no-eval", "evaluate"), ("efort", "effort"), ("xyzzy", "")]
)
def test_the_field_that_is_meant(name: str, field: str) -> None:
    assert meant(name) == field


def test_the_package_lists_its_public_names() -> None:
    assert dir(llmprune) == sorted(llmprune.__all__)
