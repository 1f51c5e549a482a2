"""What others made runs no code, wears no disguise, hangs nothing, and is refused before anything is written."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import REPORT, WEIGHTS, edit_config
from gguf_files import write_gguf
from helpers import ROOT, edit_tensor, job, on_disk, skeleton_of
from safetensors.torch import load_file, save_file

from llmprune import InputError, load, prune
from llmprune.cli.main import main
from llmprune.progress import Progress
from llmprune.reporting.html_report import report_page
from llmprune.reporting.report import PruneReport
from llmprune.sources.models import Source, load_tokenizer, open_source

CODE = "from pathlib import Path\nPath({!r}).write_text('ran')\n"


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model, to be changed."""
    return shutil.copytree(tiny, tmp_path / "model")


def opened(folder: Path) -> Source:
    return open_source(str(folder), revision=None, cache=folder, trust_remote_code=False, progress=Progress())


def open_all(folder: Path) -> None:
    """Read all that a run reads of a folder before it begins."""
    source = opened(folder)
    load_tokenizer(source, trust_remote_code=False)
    skeleton_of(source.folder).checkpoint.check_finite()


# Code


def calls_of(names: set[str]) -> list[tuple[str, ast.Call]]:
    """All calls of the methods `names` in the package and the evaluations, with where they stand."""
    found = []
    for path in sorted(path for room in ("llmprune", "eval") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_every_loader_is_told_whether_to_trust_code() -> None:
    """Left out, transformers asks on the terminal."""
    calls = calls_of({"from_pretrained", "from_config"})
    assert len(calls) > 10
    assert [where for where, call in calls if "trust_remote_code" not in {word.arg for word in call.keywords}] == []


def armed(folder: Path, trap: Path) -> Path:
    """A folder in which every file that a loader may take for code writes `trap`."""
    for name in ("evil.py", "custom_generate/generate.py", "modeling_llama.py", "tokenization_llama.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(str(trap)) + "def generate(*a, **k): pass\nclass Evil: pass\n")
    (folder / "custom_generate" / "requirements.txt").write_text("")
    everything = dict.fromkeys(
        ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor"), "evil.Evil"
    )
    edit_config(folder, auto_map=everything)
    for name in (
        "tokenizer_config.json",
        "generation_config.json",
        "processor_config.json",
        "preprocessor_config.json",
    ):
        path = folder / name
        value = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(value | {"auto_map": everything | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    return folder


SCRIPT = """
import sys
from pathlib import Path
import llmprune
from llmprune.export.generations import continuations
from llmprune.progress import Progress
from llmprune.cli.main import main
model, text, out = sys.argv[1:]
small = ["--samples", "2", "--seq-len", "8", "--no-eval", "--method", "magnitude", "--calib", text]
main(["--model", model, "--sparsity", "2:4", "--out", out, *small])
for step in (
    lambda: main(["--model", model + "/tiny.gguf", "--sparsity", "2:4", "--out", out + "2", *small]),
    lambda: main(["report", out, "--generate", "2", "--dense", model, "--prompt", "w1"]),
    lambda: llmprune.load(model),
    lambda: llmprune.load(llmprune.pack(Path(out)).out),
    lambda: main(["verify", model, "--sparsity", "2:4"]),
):
    try:
        step()
    except llmprune.PruneError as error:
        print(error)
"""


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_no_code_of_a_model_runs_though_stdin_says_yes(known: bool, copy: Path, text: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    armed(copy, trap)
    write_gguf(copy / "tiny.gguf")
    if not known:
        edit_config(copy, model_type="homemade")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(copy), str(text), str(tmp_path / "out")]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "LLMPRUNE_CACHE": str(tmp_path / "cache"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    done = subprocess.run(
        command,
        input="y\n" * 999,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
        timeout=90,
    )
    assert not trap.exists(), done.stdout + done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nsaved to  ") == (2 if known else 1), done.stdout


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", {"": "someone/kernel@main:forward"}])
def test_a_kernel_from_the_hub_is_code(key: str, value: object, copy: Path) -> None:
    edit_config(copy, **{key: value})
    with pytest.raises(InputError, match=r"needs code of its own to run .kernel 'someone/kernel"):
        opened(copy)


# Disguise


TRICKS = "\x1b[2J\x1b]0;title\x07\rhint: run rm -rf\nhint: forged\u202e\u2066\u2028\x9b\ud800"


def test_no_string_of_a_file_reaches_the_terminal_raw(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(copy, model_type=TRICKS)
    assert main(["--model", str(copy), "--sparsity", "2:4"]) == 2
    shown = capsys.readouterr().err
    assert all(letter.isprintable() for letter in shown.replace("\n", ""))
    assert [line.partition(":")[0] for line in shown.splitlines()] == ["loading libraries", "error", "hint"]
    assert "\\x1b[2J" in shown


def test_tensor_names_and_paths_are_shown_escaped(tiny: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(tiny, tmp_path / "a\x1b[31m\nhint: b")
    out = tmp_path / "out\x1b[0m\nsaved to x"
    small = ["--samples", "2", "--seq-len", "8", "--no-eval", "--method", "magnitude", "--calib", str(text)]
    assert main(["--model", str(folder), "--sparsity", "2:4", "--out", str(out), *small]) == 0
    assert main(["verify", str(out)]) == 0
    assert main(["report", str(out)]) == 0
    edit_tensor(folder, "model.norm.weight", lambda weight: weight.fill_(torch.nan))
    assert main(["--model", str(folder), "--sparsity", "2:4", "--out", str(out) + "2", *small]) == 2
    said = capsys.readouterr()
    assert all(letter.isprintable() for letter in (said.out + said.err).replace("\n", ""))
    assert not [line for line in said.err.splitlines() if line.startswith("hint: b")]
    assert not [line for line in said.out.splitlines() if line.startswith("saved to x")]
    for page in ("README.md", "prune_report.html"):
        assert "\x1b" not in (out / page).read_text(encoding="utf-8")
    assert "\nhint: b" not in (out / "README.md").read_text(encoding="utf-8")


def test_a_name_that_is_not_utf_8_is_refused_before_any_work(tiny: Path, text: Path, tmp_path: Path) -> None:
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    shutil.copytree(tiny, bad)
    for model, calib, out in ((bad, text, tmp_path / "out"), (tiny, bad, tmp_path / "out"), (tiny, text, bad / "out")):
        with pytest.raises(InputError, match=r"\\udcff.* not UTF-8"):
            prune(job(model, out, calib, samples=2, seq_len=8, method="magnitude"))
    assert not list(tmp_path.rglob("*out*"))


@pytest.mark.parametrize("name", ["a|b", "x`y`", "<b>", "[link](http://a)"])
def test_a_name_is_no_markup_in_card_and_page(name: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / name.replace("/", "∕"))
    (folder / "README.md").unlink()
    prune(job(folder, tmp_path / "out", text, samples=2, seq_len=8, method="magnitude"))
    line = next(line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if " pruned with " in line)
    assert name[0] not in "|`<[" or f"\\{name[0]}" in line
    assert "<b>" not in (tmp_path / "out" / "prune_report.html").read_text()


# What is no regular file of the folder


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listener(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)
        server.bind(path.name)
        os.chdir(here)


def outside(path: Path) -> None:
    (path.parent.parent / "secret").write_text("{}")
    path.symlink_to("../secret")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def huge(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**40)


FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", WEIGHTS,
         "model.safetensors.index.json", "chat_template.jinja", "tokenizer.model", "tekken.json"]  # fmt: skip


@pytest.mark.parametrize("make", [fifo, device, listener, outside, loop, huge])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_regular_file_of_the_folder_is_refused_unread(
    make: Callable[[Path], None], name: str, copy: Path
) -> None:
    (copy / name).unlink(missing_ok=True)
    make(copy / name)
    with pytest.raises(InputError, match=name) as refused:
        open_all(copy)
    assert refused.value.hint


@pytest.mark.parametrize("make", [fifo, device, listener, loop])
def test_a_text_or_a_token_file_that_never_ends_is_refused(
    make: Callable[[Path], None], tiny: Path, tmp_path: Path
) -> None:
    for name in ("text.txt", "tokens.safetensors", "folder/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make(tmp_path / name)
        with pytest.raises(InputError):
            prune(job(tiny, tmp_path / "out", (tmp_path / name) if "/" not in name else tmp_path / "folder"))
    make(tmp_path / "x.gguf")
    with pytest.raises(InputError):
        opened(tmp_path / "x.gguf")


def test_the_links_of_the_hugging_face_cache_are_followed(tiny: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(tiny.iterdir()):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    open_all(snapshot)
    (snapshot / "vocab.json").symlink_to("../../../elsewhere")
    with pytest.raises(InputError, match=r"vocab\.json is a link that leaves its folder"):
        open_all(snapshot)


# Wrong weights


@pytest.mark.parametrize(
    ("dtype", "spelled"),
    [(torch.int32, "I32"), (torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype: torch.dtype, spelled: str, copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (tensors[name] * 8).to(dtype)
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"'{name}' is stored as {spelled}, but '{name}' must be floating-point"):
        open_all(copy)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_weight_too_large_for_the_stored_type_is_refused_before_the_run(
    name: str, copy: Path, text: Path, tmp_path: Path
) -> None:
    edit_tensor(copy, name, lambda weight: weight.view(-1)[3:4].fill_(70_000.0))
    small: dict[str, Any] = {"samples": 2, "seq_len": 8, "method": "magnitude"}
    with pytest.raises(InputError, match=rf"'{name}' reach 70,000, the largest float16 is 65,504"):
        prune(job(copy, tmp_path / "out", text, dtype="float16", **small))
    assert not list(tmp_path.glob("*out*"))
    prune(job(copy, tmp_path / "out", text, dtype="bfloat16", **small))
    assert all(bool(tensor.isfinite().all()) for tensor in on_disk(tmp_path / "out").values())


def test_a_model_with_an_adapter_beside_it_is_refused(copy: Path) -> None:
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/else"}')
    for action in (lambda: opened(copy), lambda: load(copy)):
        with pytest.raises(InputError, match="a model with a PEFT adapter beside it") as refused:
            action()
        assert "merge" in refused.value.hint


# What comes along


def test_everything_that_is_no_weight_comes_along(copy: Path, text: Path, tmp_path: Path) -> None:
    along = {
        "tekken.json",
        "additional_chat_templates/tool.jinja",
        "processor_config.json",
        "video/frames.json",
        "a.png",
    }
    weights = {"onnx/model.onnx", "onnx/config.json", "checkpoint-5/model.safetensors", "checkpoint-5/tokenizer.json",
               "old.gguf", "model.bin.index.json", "training_args.bin", ".cache/x.json"}  # fmt: skip
    for name in along | weights:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("{}")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("private")
    (copy / "video" / "key").symlink_to("../../secret/key")
    (copy / "video" / "pipe").symlink_to("/dev/zero")
    (copy / "NOTICE").symlink_to("../secret/key")
    report = prune(job(copy, tmp_path / "out", text, samples=2, seq_len=8, method="magnitude"))
    assert [text.split()[2] for text in report.warnings] == ["NOTICE", "video/key", "video/pipe"]
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert along <= found
    assert not found & weights
    assert not {name for name in found if name.endswith(("key", "pipe", "NOTICE"))}


# Numbers, nesting, names


ODD: list[Any] = [-1, 10**9, 2**70, "x", [], [1], {"a": 1}, 1.5, float("nan")]


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
     "vocab_size", "model_type"],
)  # fmt: skip
def test_a_size_that_cannot_be_is_refused(key: str, copy: Path) -> None:
    for value in ODD:
        edit_config(copy, **{key: value})
        with pytest.raises(InputError) as refused:
            open_all(copy)
        assert refused.value.hint


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json"]
)
def test_deep_json_is_refused(name: str, copy: Path) -> None:
    if name.endswith("index.json"):
        (copy / WEIGHTS).rename(copy / "model-00001-of-00001.safetensors")  # beside a whole file it is not read
    (copy / name).write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(InputError):
        open_all(copy)


@pytest.mark.parametrize("path", ["x" * 300, f"a/{'y' * 300}/b", "~nobody_at_all/x", "null\0byte", "loop"])
def test_a_path_that_cannot_be_is_refused_wherever_it_stands(path: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    path = str(tmp_path / path) if path == "loop" else path
    small = ["--samples", "2", "--seq-len", "8", "--no-eval", "--method", "magnitude"]
    base = {"--model": str(tiny), "--calib": str(text), "--sparsity": "2:4", "--out": str(tmp_path / "out")}
    for flag in ("--model", "--calib"):
        words = [word for pair in (base | {flag: path}).items() for word in pair]
        assert main([*words, *small]) == 2, flag
    for command in (["verify", path], ["report", path], ["pack", path], ["unpack", path]):
        assert main(command) == 2, command
    with pytest.raises(InputError):
        load(path)


def damaged(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Reports each with one value, at any depth, gone or replaced by something of another type."""
    found: list[dict[str, Any]] = []

    def walk(place: list[Any]) -> None:
        value: Any = report
        for step in place:
            value = value[step]
        for new in (None, [], "x", -1, 2**80, True, {"a": {}}):
            other = json.loads(json.dumps(report))
            owner = other
            for step in place[:-1]:
                owner = owner[step]
            if place:
                owner[place[-1]] = new
                found.append(other)
        if isinstance(value, dict):
            for key in value:
                walk([*place, key])
        elif isinstance(value, list) and value:
            walk([*place, 0])

    walk([])
    return found


def test_a_damaged_report_is_understood_or_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(job(tiny, out, text, samples=2, seq_len=8, method="magnitude"))
    whole = json.loads((out / REPORT).read_text())
    for number, report in enumerate(damaged(whole)):
        (out / REPORT).write_text(json.dumps(report))
        with suppress(InputError):
            report_page(PruneReport.read(out))
        if number % 40 == 0:
            assert main(["verify", str(out)]) in (0, 1, 2)
            assert main(["report", str(out)]) in (0, 2)
    for text_ in ("[]", "3", "{", "[" * 100_000, json.dumps(whole | {"layers": [{}]})):
        (out / REPORT).write_text(text_)
        for command in (["verify", str(out)], ["pack", str(out)], ["report", str(out)]):
            assert main(command) == 2
