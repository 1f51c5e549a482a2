"""A recipe says what a calibration set holds, and a token file is that set, whatever the network does meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from helpers import save_tiny, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from calib.__main__ import main
from calib.build import KnownRuns, build, packed, sampled, shares
from calib.documents import RETRIES, documents, retried
from calib.recipe import Part, Recipe, known_recipes, read_recipe
from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.sources.texts import Reader
from llmprune.sources.tokens import calibration_tokens, load_tokens

CACHE = Path("unused")
CHAT = "{% for m in messages %}w9{{ m['role'] == 'user' and '1' or '2' }} {{ m['content'] }} {% endfor %}"


@pytest.fixture
def tokenizer() -> Any:
    """One token a word: `w7` is token 7."""
    made = word_tokenizer(100)
    made.add_special_tokens({"eos_token": "w99"})
    return made


def words(ids: Iterable[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def write(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def made(recipe: Recipe, tokenizer: Any) -> list[list[int]]:
    found: list[list[int]] = build(recipe, tokenizer, CACHE, Progress()).tokens.tolist()
    return found


# From documents to windows

IDS = st.lists(st.lists(st.integers(0, 50), max_size=12), max_size=8)


@given(IDS, st.integers(2, 7), st.sampled_from([None, 99]))
def test_packing_keeps_every_token_in_order_and_drops_less_than_a_window(
    ids: list[list[int]], length: int, end: int | None
) -> None:
    flat = [token for document in ids for token in (document if end is None else [*document, end])]
    windows = list(packed(ids, length, end))
    assert all(len(window) == length for window in windows)
    joined = [token for window in windows for token in window]
    assert joined == flat[: len(joined)]
    assert len(flat) - len(joined) < length


@given(IDS, st.integers(2, 7), st.integers(0, 5))
def test_sampling_takes_one_window_from_every_document_that_has_one(
    ids: list[list[int]], length: int, seed: int
) -> None:
    windows = list(sampled(ids, length, seed))
    long = [document for document in ids if len(document) >= length]
    for window, document in zip(windows, long, strict=True):
        assert any(window == document[start : start + length] for start in range(len(document)))
    assert windows == list(sampled(ids, length, seed))


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(1, 300))
def test_shares_add_up_and_are_the_nearest_whole_numbers(weights: list[float], total: int) -> None:
    counts = shares(weights, total)
    assert sum(counts) == total
    assert all(abs(count - total * weight / sum(weights)) < 1 for count, weight in zip(counts, weights, strict=True))


@pytest.mark.parametrize("length", [31, 32, 40])
def test_a_window_is_refused_exactly_if_it_shares_a_run(length: int) -> None:
    text = torch.randint(0, 1000, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    known = KnownRuns([text])
    window = [2000] * 30 + text[100 : 100 + length] + [2000] * 30
    assert known.hold(window) == (length >= 32)
    assert not KnownRuns([]).hold(window)
    assert not KnownRuns([[1, 2]]).hold(window)
    assert not known.hold([1, 2])


# Sources


def test_a_mix_has_the_windows_of_its_weights(tmp_path: Path, tokenizer: Any) -> None:
    a = write(tmp_path / "a.jsonl", [words([1] * 10)] * 20)
    b = write(tmp_path / "b.jsonl", [words([2] * 10)] * 20)
    recipe = Recipe("mix", (Part(path=a, weight=3), Part(path=b)), samples=8, seq_len=5, windows="sampled")
    found = made(recipe, tokenizer)
    assert sorted(map(tuple, found)) == [(1,) * 5] * 6 + [(2,) * 5] * 2
    batch = build(recipe, tokenizer, CACHE, Progress())
    assert batch.provenance.source == "mix: 6 of a.jsonl, 2 of b.jsonl"
    # They are not in the order of the sources.
    assert found != sorted(found)


def test_the_seed_sets_the_windows_and_nothing_else_does(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [words(range(i, i + 9)) for i in range(1, 60)])
    for kind in ("packed", "sampled"):
        one, again, other = (
            made(Recipe("r", (Part(path=path),), kind, samples=6, seq_len=4, seed=seed), tokenizer)  # type: ignore[arg-type]
            for seed in (1, 1, 2)
        )
        assert one == again != other


def test_packed_documents_are_closed_and_conversations_go_through_the_template(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    (tmp_path / "text.txt").write_text("w1 w2\n--\nw3")
    talk = {"talk": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6 w7"}]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(talk))
    text = Part(path=str(tmp_path / "text.txt"), separator="\n--\n")
    assert sorted(documents(text, tokenizer, 0, Progress())) == [[1, 2], [3]]
    assert made(Recipe("r", (text,), samples=1, seq_len=5), tokenizer)[0] in ([1, 2, 99, 3, 99], [3, 99, 1, 2, 99])
    chat = Part(path=str(tmp_path / "talk.jsonl"), messages="talk")
    assert made(Recipe("r", (chat,), samples=1, seq_len=5), tokenizer) == [[91, 5, 92, 6, 7]]
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        made(Recipe("r", (chat,), samples=1, seq_len=5), tokenizer)


@pytest.mark.parametrize("windows", ["packed", "sampled"])
@pytest.mark.parametrize(("bos", "begin"), [("auto", [97, 98]), ("yes", [97, 98]), ("no", [])])
def test_windows_begin_as_the_tokenizer_begins_a_text(tmp_path: Path, windows: Any, bos: str, begin: list[int]) -> None:
    """In place of their last tokens of text; a template's own BOS is left out."""
    tokenizer: Any = word_tokenizer(100, ["w97", "w98"])
    tokenizer.eos_token, tokenizer.chat_template = "w99", "w97w98" + CHAT
    path = write(tmp_path / "a.jsonl", [words(range(1, 13))])
    batch = build(Recipe("r", (Part(path=path),), windows, samples=1, seq_len=8, bos=bos), tokenizer, CACHE, Progress())
    (window,) = batch.tokens.tolist()
    inner = window[len(begin) :]
    assert (len(window), window[: len(begin)], batch.bos_tokens) == (8, begin, len(begin))
    assert inner == list(range(inner[0], inner[0] + len(inner)))
    assert max(inner) <= 12
    (tmp_path / "talk.jsonl").write_text(json.dumps({"talk": [{"role": "user", "content": "w5 w6 w7 w8 w9"}]}))
    chat = Part(path=str(tmp_path / "talk.jsonl"), messages="talk")
    found = build(
        Recipe("r", (chat,), windows, samples=1, seq_len=6 + len(begin), bos=bos), tokenizer, CACHE, Progress()
    )
    assert found.tokens.tolist() == [[*begin, 91, 5, 6, 7, 8, 9]]


def test_rows_of_tables_are_documents(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("id,body\n1,w1 w2\n2,w3\n")
    part = Part(path=str(tmp_path / "a.csv"), column="body")
    assert sorted(documents(part, tokenizer, 0, Progress())) == [[1, 2], [3]]


def test_what_is_evaluated_on_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 99, (20, 40), generator=generator).tolist()
    path = write(tmp_path / "a.jsonl", [words(document) for document in ids])
    (tmp_path / "test.txt").write_text(words(ids[3] + ids[11][:35]))
    recipe = Recipe("r", (Part(path=path),), "sampled", samples=18, seq_len=40, avoid=(str(tmp_path / "test.txt"),))
    found = made(recipe, tokenizer)
    assert sorted(found) == sorted(document for number, document in enumerate(ids) if number not in (3, 11))
    with pytest.raises(
        InputError, match=r"gives 18 windows of 40 tokens \(2 share text with .*test.txt\), but the recipe asks for 19"
    ):
        made(Recipe("r", recipe.parts, "sampled", samples=19, seq_len=40, avoid=recipe.avoid), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "{", "not JSON"),
        ("a.jsonl", "[1]", "no JSON objects"),
        ("a.jsonl", '{"body": "w1"}', "has no column 'text', only body"),
        ("a.txt", "", "is empty"),
        ("a.md", "w1", "holds no .txt and no .jsonl"),
    ],
)
def test_a_bad_source_is_refused(tmp_path: Path, tokenizer: Any, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=says):
        list(documents(Part(path=str(tmp_path)), tokenizer, 0, Progress()))


# The Hub


class Stream:
    """A streamed data set that breaks off at some documents, once each, and counts what is pulled."""

    def __init__(self, rows: list[dict[str, Any]], breaks: set[int]) -> None:
        self.rows, self.breaks, self.start, self.state = rows, breaks, 0, SimpleNamespace(pulled=0, shuffled=None)

    def shuffle(self, seed: int, buffer_size: int) -> Stream:
        self.state.shuffled = seed
        return self

    def skip(self, count: int) -> Stream:
        made = Stream(self.rows, self.breaks)
        made.start, made.state = count, self.state
        return made

    def __iter__(self) -> Any:
        for number in range(self.start, len(self.rows)):
            if number in self.breaks:
                self.breaks.remove(number)
                raise ConnectionResetError("reset by peer")
            self.state.pulled += 1
            yield self.rows[number]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Hub with one data set of a thousand documents."""
    state = SimpleNamespace(stream=Stream([{"text": words([n % 90 + 1] * 12)} for n in range(1000)], set()), asked=[])

    def load_dataset(*arguments: object, **options: object) -> Stream:
        state.asked.append((arguments, options))
        return state.stream

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("calib.documents.time.sleep", lambda _: None)
    return state


def test_a_data_set_is_streamed_no_further_than_needed(hub: SimpleNamespace, tokenizer: Any) -> None:
    part = Part(repo="org/set", config="en", revision="v1")
    found = made(Recipe("r", (part,), "sampled", samples=20, seq_len=10, seed=3), tokenizer)
    assert len(found) == hub.stream.state.pulled == 20
    assert hub.stream.state.shuffled == 3
    assert hub.asked == [(("org/set", "en"), {"split": "train", "revision": "v1", "streaming": True})]


def test_a_stream_that_breaks_off_goes_on_where_it_broke(hub: SimpleNamespace, tokenizer: Any) -> None:
    recipe = Recipe("r", (Part(repo="org/set"),), "sampled", samples=20, seq_len=10)
    expected = made(recipe, tokenizer)
    hub.stream = Stream(hub.stream.rows, {0, 7, 8, 19})
    assert made(recipe, tokenizer) == expected
    assert hub.stream.state.pulled == 20


def test_rows_that_are_lines_of_one_text_are_joined_in_order(hub: SimpleNamespace, tokenizer: Any) -> None:
    part = Part(repo="org/wiki", join=True)
    (found,) = documents(part, tokenizer, 0, Progress())
    assert found == [number for row in hub.stream.rows for number in [int(row["text"].split()[0][1:])] * 12]
    assert hub.stream.state.shuffled is None


@pytest.mark.parametrize(("failures", "fails"), [(RETRIES, False), (RETRIES + 1, True)])
def test_patience_ends(failures: int, fails: bool) -> None:
    left = [failures]
    waits: list[float] = []

    def opened(skip: int) -> Iterable[dict[str, Any]]:
        if left[0]:
            left[0] -= 1
            raise ConnectionError("no route")
        return [{}] * (3 - skip)

    def read() -> int:
        return len(list(retried(opened, "org/set", Progress(), waits.append)))

    if fails:
        with pytest.raises(InputError, match=r"org/set cannot be read .* ConnectionError: no route"):
            read()
    else:
        assert read() == 3
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0]


@pytest.mark.parametrize("error", [FileNotFoundError("no such data set"), ValueError("bad config"), KeyError("x")])
def test_what_time_does_not_heal_fails_at_once(error: Exception) -> None:
    def opened(_: int) -> Iterable[dict[str, Any]]:
        raise error

    def never(_: float) -> None:
        raise AssertionError

    with pytest.raises(InputError, match=type(error).__name__):
        list(retried(opened, "org/set", Progress(), never))


# Recipes and the command line


def test_the_recipes_that_come_along_are_good() -> None:
    assert known_recipes() == ["c4", "fineweb-edu", "mix", "wikitext2"]
    for name in known_recipes():
        recipe = read_recipe(name, samples=7)
        assert recipe.name == name
        assert recipe.samples == 7
        assert "wikitext2" in recipe.avoid


GOOD = '[[source]]\npath = "a.txt"\n'
BAD = {
    "": r"no \[\[source\]\]",
    "samples = ": "is no recipe",
    "source = 3": r"no \[\[source\]\]",
    "[[source]]\n": "either path or repo",
    '[[source]]\npath = "a"\nrepo = "b"': "either path or repo",
    '[[source]]\npath = "a"\nweight = 0': "weight above 0",
    '[[source]]\npath = "a"\nfile = "b"': "unknown setting 'file'",
    "[[source]]\npath = 3": "path = 3 is of the wrong type",
    f"sample = 3\n{GOOD}": "unknown setting 'sample'",
    f"samples = 0\n{GOOD}": "cannot be",
    f"samples = true\n{GOOD}": "wrong type",
    f"seq_len = 1\n{GOOD}": "cannot be",
    f'windows = "random"\n{GOOD}': "cannot be",
    f'bos = "maybe"\n{GOOD}': "bos = 'maybe' cannot be",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_recipe_says_what_is_wrong(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(InputError, match=BAD[text]):
        read_recipe(str(tmp_path / "r.toml"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, a text and a recipe."""
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(words([number % 90 + 1 for number in range(400)]))
    (tmp_path / "mine.toml").write_text('samples = 3\nseq_len = 8\n[[source]]\npath = "text.txt"\n')
    return tmp_path


def test_a_recipe_becomes_a_token_file_that_a_run_takes(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["mine.toml", "--model", "tiny", "--out", "t.safetensors"]
    assert main([*flags, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    batch = load_tokens(work / "t.safetensors", None, None, 96)
    assert (batch.provenance.sha256, batch.tokens.shape) == (facts["sha256"], (3, 8))
    with safe_open(work / "t.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["llmprune_tokens"])["recipe"]["parts"][0]["path"] == "text.txt"
    before = (work / "t.safetensors").read_bytes()
    assert main(flags) == 0
    assert (work / "t.safetensors").read_bytes() == before
    assert main([*flags, "--samples", "5", "--seed", "1"]) == 0
    assert "5 x 8 tokens of mine: 5 of text.txt" in capsys.readouterr().out


def test_a_plain_text_is_cut_as_a_run_would_cut_it(work: Path) -> None:
    assert main(["text.txt", "--model", "tiny", "--out", "t.safetensors", "--samples", "4", "--seq-len", "16"]) == 0
    reader = Reader(word_tokenizer(96), CACHE, Progress())
    expected = calibration_tokens("text.txt", reader, samples=4, seq_len=16, seed=0)
    assert torch.equal(load_tokens(work / "t.safetensors", None, None, 96).tokens, expected.tokens)


FLAWS: dict[str, Callable[[Path], list[str]]] = {
    "no such recipe": lambda _: ["c5"],
    "no such file": lambda _: ["no.toml"],
    "too long": lambda _: ["mine.toml", "--seq-len", "500"],
    "damaged": lambda work: [str((work / "bad.toml").write_text("=") and "bad.toml")],
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_refusal_leaves_the_old_file_alone(work: Path, capsys: pytest.CaptureFixture[str], flaw: str) -> None:
    (work / "t.safetensors").write_text("old")
    assert main([*FLAWS[flaw](work), "--model", "tiny", "--out", "t.safetensors"]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert (error[:7], hint[:6]) == ("error: ", "hint: ")
    assert (work / "t.safetensors").read_text() == "old"
    assert not list(work.glob(".*"))
