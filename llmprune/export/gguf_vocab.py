"""A tokenizer as llama.cpp's own: its tokens, merges or scores, how it splits text, and what it puts around it.

What counts is what the loaded tokenizer does, not what its files are called: byte-level BPE is named by the expressions
that its pre-tokenizer splits with, and SentencePiece's BPE gets its scores from the order of the merges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import starmap
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.runtime.foreign import parse_json
from llmprune.sources.bos import PROBE, added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Mapping[str, Any]
SPACE = "▁"
"""SentencePiece's letter for a space."""
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(after: str) -> str:
    return rf"{_BEFORE}{_UPPER}*{_LOWER}+{after}|{_BEFORE}{_UPPER}+{_LOWER}*{after}"


GPT2, DIGITS = "gpt-2", "digits"
SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((_WORDS + r"|\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_WORDS + r"|\p{N}{1,3}" + _REST,), False): "dbrx",
    ((_WORDS + r"|\p{N}" + _REST,), False): "qwen2",
    ((_cased("") + r"|\p{N}" + _SLASHES,), True): "tekken",
    ((_cased(_CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _SLASHES,), False): "gpt-4o",
}
"""What a pre-tokenizer splits by, one expression after the other, and whether a word that is a token is never split:
llama.cpp's name for both. `GPT2` is the expression of a byte-level step itself, `DIGITS` every digit on its own."""


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, rows: int, stops: Sequence[int], progress: Progress
) -> dict[str, Any]:
    """The keys of a GGUF header that describe a tokenizer.

    Args:
        tokenizer: of the model.
        rows: of the embedding matrix, one a token; what is beyond the tokenizer's is filled with unused tokens.
        stops: the tokens that end a text, as the model's generation config says.
        progress: told of what llama.cpp does in another way.

    Raises:
        InputError: llama.cpp has no such tokenizer, or there are more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("a tokenizer written in Python")
    form: Form = parse_json(backend.to_str())
    model = form["model"]
    if model["type"] != "BPE":
        raise _unknown(f"a vocabulary of the kind {model['type']}")
    last = max([*model["vocab"].values(), *(int(token["id"]) for token in form["added_tokens"])])
    if last >= rows:
        raise InputError(
            f"the tokenizer has a token {last}, but the embedding matrix {rows} rows",
            "the tokenizer does not belong to this model",
        )
    steps = list(_steps(form["pre_tokenizer"], "pretokenizers"))
    if any(step["type"] == "ByteLevel" for step in steps):
        own = _byte_level(form, steps, rows)
    elif model["byte_fallback"]:
        own = _sentencepiece(form, steps, rows, progress)
    else:
        raise _unknown("a vocabulary of BPE that is neither byte-level nor falls back to bytes")
    return own | _around(tokenizer, stops, progress) | _templates(tokenizer)


def _unknown(what: str) -> InputError:
    return InputError(
        f"the tokenizer has {what}, which llmprune cannot say in GGUF",
        "byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece's BPE (Llama 2, Gemma) are known",
    )


def _steps(form: Form | None, inner: str) -> Iterator[Form]:
    """The steps of a part of a tokenizer, those inside sequences one by one."""
    if form is None:
        return
    if form["type"] != "Sequence":
        yield form
        return
    for step in form[inner]:
        yield from _steps(step, inner)


def _tokens(form: Form, rows: int) -> tuple[list[str], list[int]]:
    """Text and kind of every token."""
    texts = [f"[PAD{number}]" for number in range(rows)]
    kinds = [int(TokenType.UNUSED)] * rows
    for text, number in form["model"]["vocab"].items():
        texts[number], kinds[number] = text, int(TokenType.NORMAL)
    for token in form["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        texts[token["id"]], kinds[token["id"]] = token["content"], int(kind)
    return texts, kinds


def _pairs(form: Form) -> list[tuple[str, str]]:
    """The merges, first to last."""
    found = (pair.split(" ") if isinstance(pair, str) else pair for pair in form["model"]["merges"])
    return [(left, right) for left, right in found]


def _byte_level(form: Form, steps: Sequence[Form], rows: int) -> dict[str, Any]:
    """Byte-level BPE: tokens, and the merges in their order."""
    for step in _steps(form["normalizer"], "normalizers"):
        if step["type"] != "NFC":  # llama.cpp has none; text is nearly always in this form already
            raise _unknown(f"a normalizer {step['type']} before byte-level BPE")
    texts, kinds = _tokens(form, rows)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split_name(steps, bool(form["model"]["ignore_merges"])),
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        # A space inside a merge would be read as the one between its parts.
        "tokenizer.ggml.merges": [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _pairs(form)],
    }


def split_name(steps: Sequence[Form], whole: bool) -> str:
    """llama.cpp's name for what a pre-tokenizer does.

    Args:
        steps: of the pre-tokenizer.
        whole: whether a word that is a token is never split.

    Raises:
        InputError: there is no name for it.
    """
    name = SPLITS.get((tuple(_expressions(steps)), whole))
    if name is None:
        told = ", ".join(str(step.get("pattern", step["type"]))[:60] for step in steps)
        raise _unknown(f"a pre-tokenizer ({told})")
    return name


def _expressions(steps: Sequence[Form]) -> Iterator[str]:
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            if step["use_regex"]:
                yield GPT2
        elif kind == "Digits" and step["individual_digits"]:
            yield DIGITS
        elif kind == "Split" and (step["behavior"], step["invert"]) in {("Isolated", False), ("Removed", True)}:
            yield step["pattern"].get("Regex", "")
        else:
            yield str(dict(step))


def _sentencepiece(form: Form, steps: Sequence[Form], rows: int, progress: Progress) -> dict[str, Any]:
    """SentencePiece's BPE: tokens, and scores that give the merges the same order."""
    texts, kinds = _tokens(form, rows)
    vocab, pairs = form["model"]["vocab"], _pairs(form)
    ranks: dict[str, int] = {}
    for rank, joined in enumerate(starmap(str.__add__, pairs)):
        ranks.setdefault(joined, rank)
    known = set(pairs)
    # llama.cpp joins whatever makes a token.
    unknown = sum(
        (text[:at], text[at:]) not in known and text[:at] in vocab and text[at:] in vocab
        for text in ranks
        for at in range(1, len(text))
    )
    if unknown:
        progress.warn(f"llama.cpp can split text at other places: {unknown} ways to join tokens are no merges")
    scores = [-1000.0] * rows
    for text, number in vocab.items():
        scores[number] = -float(ranks.get(text, len(pairs)))
    for byte in range(256):
        if (number := vocab.get(f"<0x{byte:02X}>")) is not None:
            kinds[number] = int(TokenType.BYTE)
    if (number := vocab.get(form["model"]["unk_token"])) is not None:
        kinds[number] = int(TokenType.UNKNOWN)
    user = int(TokenType.USER_DEFINED)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [
            text.replace(SPACE, " ") if kind == user else text for text, kind in zip(texts, kinds, strict=True)
        ],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _begins_with_space(form, steps, progress),
    }


def _begins_with_space(form: Form, steps: Sequence[Form], progress: Progress) -> bool:
    """Whether a space is put before a text.

    Raises:
        InputError: text is changed in another way.
    """
    prefix = False
    for step in (*_steps(form["normalizer"], "normalizers"), *steps):
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif kind == "Metaspace" and step["replacement"] == SPACE:
            if step["prepend_scheme"] != "never":
                prefix = True
                progress.warn(
                    "llama.cpp puts a space behind every special token, and before a text that begins with one; "
                    "this tokenizer may not"
                )
        elif not (kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE) and not (
            kind == "Split" and step["pattern"] == {"String": " "}  # there is none any more
        ):
            raise _unknown(f"a step {kind} before SentencePiece's BPE")
    return prefix


def _around(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], progress: Progress) -> dict[str, Any]:
    """The special tokens, and which of them stand around a text."""
    before, after = added_tokens(tokenizer), _tokens_after(tokenizer)
    for tokens, name in ((before, "bos_token_id"), (after, "eos_token_id")):
        if tokens and tokens != (getattr(tokenizer, name),):
            raise _unknown(f"tokens {list(tokens)} around a text, beside {name} {getattr(tokenizer, name)}")
    ends = [number for number in (tokenizer.eos_token_id, *stops) if number is not None]
    if not ends:
        progress.warn("the tokenizer names no token that ends a text; llama.cpp takes one of its own choice")
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": next(iter(ends), None),
        "eot": next((number for number in ends if number != ends[0]), None),
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    found: dict[str, Any] = {f"tokenizer.ggml.{key}_token_id": int(v) for key, v in ids.items() if v is not None}
    return found | {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}


def _tokens_after(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token ids that the tokenizer puts behind a text."""
    whole: list[int] = tokenizer(PROBE)["input_ids"]
    plain: list[int] = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    return tuple(whole[len(added_tokens(tokenizer)) + len(plain) :])


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The chat template; where there are several, those under their names, too."""
    said = tokenizer.chat_template
    templates: Mapping[str, str] = said if isinstance(said, Mapping) else {"default": said} if said else {}
    others = sorted(templates.keys() - {"default"})
    found: dict[str, Any] = {f"tokenizer.chat_template.{name}": templates[name] for name in others}
    if others:
        found["tokenizer.chat_templates"] = others
    if "default" in templates:
        found["tokenizer.chat_template"] = templates["default"]
    return found
