"""The form of `prune_report.json`: which keys it must have, and the types of their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MOST_BLOCKS = 100_000


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, float) or _whole(value)


def _finite(value: Any) -> bool:
    return _number(value) and math.isfinite(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bool) or _number(value)


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_whole(size) and size > 0 for size in value)


def _scope(value: Any) -> bool:
    return value in ("group", "row", "layer", "model")


def _setting(value: Any) -> bool:
    return _whole(value) or (isinstance(value, list) and all(map(_scalar, value)))


def _anything(value: Any) -> bool:
    return True


WORDS = {
    _whole: "a whole number", _number: "a number", _finite: "a finite number", _text: "text", _scalar: "a single value",
    _shape: "two sizes", _setting: "a whole number or a list", _scope: "a scope",
}  # fmt: skip
_PERPLEXITY = {"value": _number, "error": _number, "windows?": _whole, "context?": _whole, "*": _scalar}
_WINDOWS = {"source": _text, "samples": _whole, "seq_len": _whole, "seed": (_whole,), "bos_tokens?": _whole,
            "characters?": (_whole,), "*": _scalar}  # fmt: skip
FORM: Mapping[str, Any] = {
    "llmprune": _text,
    "command": _text,
    "versions": {"*": _text},
    "model": {"name": _text, "revision": _text, "parameters": _whole, "parameters_left?": _whole,
              "parameters_beside?": _whole, "blocks?": _whole, "*": _scalar},
    "sparsity": {
        "pattern": _text, "meaning": _text, "scope": _scope, "fraction": _finite, "note": _text, "removed": [_text],
        "config?": {"*": _setting}, "*": _anything,
    },
    "method": {"name": _text, "*": _anything},
    "recipe": {"*": _scalar},
    "calibration": _WINDOWS | {"sha256": _text, "tokens?": _whole, "self_generated?": _whole},
    "evaluation": (_WINDOWS | {"dense": _PERPLEXITY, "pruned": _PERPLEXITY, "overlap?": _number},),
    "coverage": {"block_parameters": _whole, "covered?": _whole, "fraction": _finite, "skipped": {"*": _whole},
                 "*": _scalar},
    "layers": [{
        "name": _text, "shape": _shape, "pattern": _text, "pruned": _whole, "unpruned_zeros": _whole,
        "error": _number, "status": _text, "tokens": _whole, "stats": {"*": _number}, "grid?": _text,
    }],
    "quantization?": {"grid": _text, "meaning": _text, "bits": _whole, "group_size": (_whole,), "format": _text,
                      "*": _scalar},
    "distillation?": {
        "command": _text, "teacher": _text, "text": _WINDOWS, "tokens": _whole, "generated": _whole,
        "held_out": _whole, "epochs": _whole, "steps": _whole, "batch_size": _whole, "learning_rate": _finite,
        "optimizer": _text, "temperature": _finite, "mix": _finite, "top_k": _whole, "trained_parameters": _whole,
        "frozen": [_text], "precision": _text, "divergences": [{"step": _whole, "divergence": _number}],
        "kept_step": _whole, "divergence_before": _number, "divergence_after": _number,
        "evaluation": (_WINDOWS | {"before": _PERPLEXITY, "after": _PERPLEXITY, "overlap": _number},),
        "threads": _whole, "processes": _whole, "peak_memory": _whole, "seconds": {"total": _finite, "*": _finite},
        "fingerprint": {"*": _text}, "*": _scalar,
    },
    "reconstructions": [{"block": _text, "before": _number, "after": _number, "skipped_steps?": _whole}],
    "mixtures?": [{
        "block": _text, "experts": _whole, "kept": [_whole], "super_experts": [_whole], "tokens": [_whole],
        "error_uncompensated": _number, "error": _number, "ridge": (_number,), "retries": _whole,
    }],
    "blocks?": [{"name": _text, "seconds": _finite, "peak_memory": _whole, "memory?": _whole,
                 "expert_tokens?": [_whole]}],
    "generations?": [{"prompt": _text, "dense": _text, "pruned": _text}],
    "warnings?": [_text],
    "size?": {"*": _whole},
    "seconds?": {"*": _finite},
    "machine?": {"*": _anything},
    "processes?": {"*": _anything},
    "peak_memory?": _whole,
    "baseline_memory?": _whole,
    "out?": _text,
    "files?": [_text],
}  # fmt: skip
"""Key -> form of its value.

`x?` may be missing or an empty object, `*` stands for all others, a value with `(form,)` may be null.
"""


def fault(value: Any, form: Any = FORM, path: str = "") -> str:
    """What is wrong with the form of a report of the current schema, or ''."""
    if callable(form):
        return "" if form(value) else f"{path} is {_shown(value)}, not {WORDS[form]}"
    if isinstance(form, tuple):
        return fault(value, form[0], path) if value is not None else ""
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{path} is {_shown(value)}, not a list"
        return next(filter(None, (fault(item, form[0], f"{path}[{at}]") for at, item in enumerate(value))), "")
    if not isinstance(value, Mapping):
        return f"{path or 'it'} is {_shown(value)}, not an object"
    return next(filter(None, _faults(value, form, path)), "")


def _faults(value: Mapping[str, Any], form: Mapping[str, Any], path: str) -> Any:
    """What is wrong with the entries of an object, one by one."""
    known = set()
    for key, inner in form.items():
        name = key.removesuffix("?")
        known.add(name)
        if name == "*" or (key != name and value.get(name, {}) == {}):
            continue
        if name not in value:
            yield f"{path or 'it'} has no {name!r}"
        else:
            yield fault(value[name], inner, f"{path}.{name}".lstrip("."))
    for name in value.keys() - known if "*" in form else ():
        yield fault(value[name], form["*"], f"{path}.{name}".lstrip("."))


def _shown(value: Any) -> str:
    return repr(value)[:40] if not isinstance(value, dict | list) else f"a {type(value).__name__}"
