"""What a run leaves behind says what was done, in words that are explained."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, random_tokens, reload
from huggingface_hub import ModelCard

from llmprune import DistillJob, Job, PruneReport, distill, prune
from llmprune.errors import InputError
from llmprune.pipeline.report_builder import skipped_steps
from llmprune.reporting.model_card import model_card
from llmprune.reporting.report import FILE, MixtureReport
from llmprune.streaming.batch_shards import held_out_batches

DOCS = ROOT / "docs" / "reference" / "report.md"
LEARNT = "distillation"
FREE = (
    *("versions", "fingerprint", "method.options", "sparsity.config", "coverage.skipped"),
    *(f"{LEARNT}.{key}" for key in ("text", "evaluation.before", "evaluation.after", "seconds", "fingerprint")),
)
STATS = "layers[].stats."
GENERATION = {f"generations[].{key}" for key in ("prompt", "dense", "pruned")}
SPREAD = {"processes", *(f"processes.{key}" for key in ("world_size", "tokens", "rows"))}
QUANTISED = {"model.stored_as", "model.dequantized_to"}
WRAPPER = {"model.tower", "model.beside", "model.parameters_beside"}
FEWER = {"seconds.experts"} | {f"mixtures[].{field.name}" for field in fields(MixtureReport)}
GRID = {"quantization"} | {
    f"quantization.{key}" for key in ("grid", "meaning", "bits", "group_size", "scale_dtype", "format")
}
SIZE = {"sparsity.asked", "seconds.choose_sizes"}
SOMETIMES = (
    {"machine.device_memory", "seconds.allocate"} | GENERATION | SPREAD | WRAPPER | QUANTISED | FEWER | GRID | SIZE
)


@pytest.fixture(scope="module")
def report(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> PruneReport:
    """The report of a small run with some layers left dense."""
    out = tmp_path_factory.mktemp("out") / "tiny-pruned"
    small = {"samples": 4, "seq_len": 32, "eval_windows": 3, "eval_context": 32}
    job = Job(
        str(tiny), "2:4", effort="best", calib=str(text), eval_text=str(text), out=out, skip=("*.v_proj",), **small
    )  # type: ignore[arg-type]
    return prune(replace(job, command="llmprune --model tiny --sparsity 2:4"))


def paths(value: Any, path: str = "") -> Iterator[str]:
    """The dotted names of all leaves: `model.name`, `layers[].name`, `versions.*`."""
    if path in FREE:
        yield f"{path}.*"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from paths(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield path
        for item in value:
            yield from paths(item, f"{path}[]")
    else:
        yield path


def documented() -> dict[str, tuple[str, str]]:
    """Key -> type and unit, from the table."""
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in lines]
    assert all(meaning for *_, meaning in rows)
    keys = [key.strip("`") for key, *_ in rows]
    assert len(keys) == len(set(keys))
    return {key: (kind, unit) for key, (_, kind, unit, _) in zip(keys, rows, strict=True)}


def test_every_key_is_documented_and_nothing_else(report: PruneReport) -> None:
    keys = set(paths(report.to_json())) | {"evaluation"}
    others = {key for key in documented() if key.startswith((STATS, LEARNT))}
    assert keys - others == documented().keys() - SOMETIMES - others


def test_every_key_of_a_distillation_is_documented(report: PruneReport, text: Path, tiny: Path) -> None:
    out, data = Path(report.out).with_name("distilled"), str(text)
    small = {"tokens": 64, "seq_len": 16, "batch_size": 2, "held_out": 2, "eval_windows": 2, "eval_context": 16}
    taught = distill(DistillJob(Path(report.out), str(tiny), calib=data, eval_text=data, out=out, **small))  # type: ignore[arg-type]
    assert {path for path in paths(taught.to_json()) if path.startswith(f"{LEARNT}.")} | {f"{LEARNT}.evaluation"} == {
        key for key in documented() if key.startswith(f"{LEARNT}.")
    }
    check(taught.to_json())
    assert PruneReport.from_json(json.loads(json.dumps(taught.to_json(), allow_nan=False))) == taught


def test_every_value_has_the_type_that_is_documented(report: PruneReport) -> None:
    check(report.to_json())


def check(found: dict[str, Any]) -> None:
    """Compare the types of all values with those that are documented."""
    types = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "list": list,
        "object": dict,
        "boolean": bool,
        "null": type(None),
    }

    def compare(value: Any, path: str = "") -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                compare(item, f"{path}.*" if path in FREE else f"{path}.{key}".lstrip("."))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                compare(item, f"{path}[]")
        if path in (known := documented()):
            kinds = re.split(" or |, ", known[path][0])
            assert any(isinstance(value, types[kind.split()[0]]) for kind in kinds), path

    compare(found)


def test_sizes_and_times_have_units() -> None:
    for key, (_, unit) in documented().items():
        if key.startswith(("seconds.", "size.")) or key.endswith("memory"):
            assert unit in {"seconds", "bytes"}, key


def test_a_report_survives_json(report: PruneReport) -> None:
    again = PruneReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))
    assert again == report
    assert again.to_json() == report.to_json()
    assert PruneReport.read(Path(report.out)) == replace(report, out="tiny-pruned")


def test_without_evaluation_there_is_none(tiny: Path, text: Path, tmp_path: Path) -> None:
    job = Job(str(tiny), "50%", "magnitude", calib=str(text), samples=2, seq_len=16, out=tmp_path / "o", evaluate=False)
    report = prune(job)
    assert report.evaluation is None
    assert PruneReport.read(tmp_path / "o") == replace(report, out="o")
    card = ModelCard.load(tmp_path / "o" / "README.md")
    assert card.data.eval_results is None
    assert "perplexity" not in card.text


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"layers": [{}]}', '{"layers": [], "more": 1}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(InputError, match=FILE):
        PruneReport.read(tmp_path)


def test_the_figures_agree_with_each_other(report: PruneReport) -> None:
    coverage = report.coverage
    assert coverage["covered"] == sum(rows * columns for rows, columns in (layer.shape for layer in report.layers))
    assert coverage["fraction"] == coverage["covered"] / coverage["block_parameters"]
    assert coverage["skipped"] == {"--skip": 2 * 16 * 32}
    assert all(2 * layer.pruned == layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert all(0 < layer.error < 1 for layer in report.layers)
    windows = 4 + report.calibration["self_generated"]
    assert report.calibration["tokens"] == windows * 32
    assert all(layer.tokens == (windows - len(held_out_batches(windows))) * 32 for layer in report.layers)
    seconds = report.seconds
    parts = ("prepare", "dense_evaluation", "prune", "verify", "pruned_evaluation")
    assert sum(seconds[part] for part in parts) <= seconds["total"] + 0.01
    assert seconds["solve"] + seconds["error"] + seconds["write"] <= seconds["prune"] + 0.01
    assert report.size["pruned"] == sum(path.stat().st_size for path in Path(report.out).glob("*.safetensors"))


# The model card


def test_the_card_has_valid_metadata(report: PruneReport) -> None:
    data = ModelCard.load(Path(report.out) / "README.md").data
    assert (data.license, data.language, data.base_model) == ("mit", "en", "someone/tiny")
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.model_name == "tiny-pruned"
    assert data.eval_results
    assert report.evaluation
    for result, key in zip(data.eval_results, ("pruned", "dense"), strict=True):
        assert result.metric_type == "perplexity"
        assert result.dataset_name == "words.txt"
        assert result.metric_value == pytest.approx(report.evaluation[key]["value"], abs=1e-3)
    assert "dense model" in str(data.eval_results[1].metric_name)


def test_a_known_text_goes_by_its_name_on_the_hub(report: PruneReport, tiny: Path) -> None:
    assert report.evaluation
    data = ModelCard(model_card(replace(report, evaluation=report.evaluation | {"source": "wikitext2"}), tiny)).data
    assert data.eval_results
    (known, *_) = data.eval_results
    assert (known.dataset_type, known.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert (known.dataset_name, known.dataset_split) == ("WikiText-2 raw", "test")


def test_the_card_says_what_was_done_and_what_came_of_it(report: PruneReport) -> None:
    card = ModelCard.load(Path(report.out) / "README.md").text
    assert report.evaluation
    assert report.command in card
    assert "2:4, prunes 2 of every 4 weights, 50 %" in card
    assert f"4 x 32 tokens of {report.calibration['source']}" in card
    for key in ("dense", "pruned"):
        value = report.evaluation[key]
        assert (
            f"perplexity, {key} (words.txt, 3 windows of 32 tokens, begun without BOS) | "
            f"{value['value']:.2f} ± {value['error']:.2f}" in card
        )
    assert f"{report.coverage['fraction']:.1%} of the block parameters" in card
    assert "exact zeros" in card


def test_the_card_tells_how_to_keep_the_zeros_and_that_does_keep_them(report: PruneReport) -> None:
    text = ModelCard.load(Path(report.out) / "README.md").text
    code = re.findall(r"```python\n(.*?)```", text.partition("## Continue")[2], re.DOTALL)[0]
    model = reload(Path(report.out))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zeros = {name: weight == 0 for name, weight in model.named_parameters()}
    tokens = random_tokens(2, 16)
    before, after = code.split("# ... loss.backward(); optimizer.step()\n")
    scope: dict[str, Any] = {"model": model, "torch": torch}
    exec(before, scope)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    changed = dict(model.named_parameters())
    assert any(bool(changed[layer.name + ".weight"][zeros[layer.name + ".weight"]].any()) for layer in report.layers)
    exec(after, scope)
    assert all(torch.equal(weight == 0, zeros[name]) for name, weight in model.named_parameters())


def test_a_card_without_pruned_weights_speaks_of_no_zeros(report: PruneReport, tiny: Path) -> None:
    smaller = replace(report, sparsity=report.sparsity | {"fraction": 0.0, "note": "the model is smaller"})
    card = model_card(smaller, tiny)
    assert "zeros" not in card
    assert "\nthe model is smaller.\n" in card


def test_the_card_warns_of_what_the_run_warned_of(report: PruneReport, tiny: Path) -> None:
    warned = replace(report, warnings=["this model is hardly usable"])
    assert "\n> this model is hardly usable\n" in model_card(warned, tiny)


def test_the_base_of_a_hub_model_is_that_model(report: PruneReport, tiny: Path) -> None:
    pruned = replace(report, model=report.model | {"name": "org/name", "revision": "abc"})
    assert ModelCard(model_card(pruned, tiny)).data.base_model == "org/name"


@pytest.mark.parametrize(
    ("base", "named"),
    [("org/name", "org/name"), (["org/a", "/home/ada/b", "org/c"], ["org/a", "org/c"]), (["../b", "org/c"], "org/c"),
     ("../models/b", None), (r"C:\models\b", None), (["/home/ada/b"], None)],
)  # fmt: skip
def test_a_base_that_is_no_name_on_the_hub_is_not_repeated(
    report: PruneReport, tmp_path: Path, base: object, named: object
) -> None:
    (tmp_path / "README.md").write_text(f"---\nbase_model: {json.dumps(base)}\n---\n")
    assert ModelCard(model_card(report, tmp_path)).data.base_model == named


@pytest.mark.parametrize(
    "card",
    [
        None,
        "",
        "no metadata",
        "---\n: [\n---\n",
        "---\nlicense: 3\nmodel-index: x\n---\n",
    ],
)
def test_a_source_without_a_proper_card_is_no_obstacle(report: PruneReport, tmp_path: Path, card: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    made = ModelCard(model_card(report, tmp_path))
    assert made.data.base_model is None
    assert made.data.model_name == "tiny-pruned"


def test_skipped_optimizer_steps_are_warned_of(report: PruneReport) -> None:
    assert skipped_steps(report) == []
    first, *others = report.reconstructions
    (warning,) = skipped_steps(replace(report, reconstructions=[replace(first, skipped_steps=3), *others]))
    assert warning.startswith(f"3 optimizer steps were skipped in 1 of {len(report.reconstructions)} blocks")
