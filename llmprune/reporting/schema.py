"""The schema of `prune_report.json`: its number, and what the keys of older ones are called now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.errors import InputError

SCHEMA = 2
RENAMED_IN_2 = {
    "": {"refinements": "reconstructions", "samples": "generations"},
    "sparsity": {"done": "removed"},
    "recipe": {"reconstruct": "compensate", "refine": "reconstruct", "own": "self_calibration"},
    "calibration": {"own": "self_generated", "own_sha256": "self_generated_sha256"},
    "layers[]": {"kept_zeros": "unpruned_zeros"},
    "layers[].stats": {
        "ridge": "damping_lambda",
        "relative_ridge": "compensation_ridge",
        "damping_raises": "damping_retries",
        "choice_raises": "choice_retries",
        "refit_raises": "compensation_retries",
        "target_raises": "target_retries",
        "order_raises": "order_retries",
        "error_unfitted": "error_uncompensated",
        "error_refitted": "error_compensated",
        "directions": "participation_ratio",
        "top_direction": "top_eigenvalue_ratio",
    },
    "refinements[]": {"left_out": "skipped_steps"},
    "seconds": {"own_text": "self_calibration", "refine": "reconstruct"},
    "processes": {"size": "world_size"},
}
"""Path of an object in schema 1 -> old key -> new key."""


def upgraded(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report, whole or in part, with the keys of the current schema; one without a number has schema 1.

    Raises:
        InputError: its schema is newer than this version of llmprune.
    """
    schema = report.get("schema", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise InputError(
            f"the report has schema {schema}, but this version of llmprune reads schemas up to {SCHEMA}",
            "update llmprune: pip install --upgrade llmprune",
        )
    return dict(report) if schema == SCHEMA else {"schema": SCHEMA, **_renamed(report)}


def _renamed(value: Any, path: str = "") -> Any:
    if isinstance(value, Mapping):
        names = RENAMED_IN_2.get(path, {})
        return {names.get(key, key): _renamed(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
    return [_renamed(item, f"{path}[]") for item in value] if isinstance(value, list) else value
