"""A grid of `eval.sweep` as a picture: perplexity over the last setting, a line for every combination of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Cells = list[tuple[dict[str, Any], dict[str, Any]]]


def series(cells: Cells, text: str | None) -> dict[str, list[tuple[str, float, float]]]:
    """Name of a line -> setting, value, standard error of its points.

    Args:
        cells: settings and results.
        text: which text's perplexity, `evaluation` for that of the run; None for the mean layer error.
    """
    found: dict[str, list[tuple[str, float, float]]] = {}
    for settings, result in cells:
        *others, last = (str(value) for value in settings.values())
        if text is None:
            point = (last, result["mean_layer_error"], 0.0)
        else:
            measured = result["evaluation"]["pruned"] if text == "evaluation" else result["texts"][text]
            point = (last, measured["value"], measured["error"])
        found.setdefault(", ".join(others) or "pruned", []).append(point)
    return found


def draw(cells: Cells, dense: dict[str, Any], out: Path) -> None:
    """Write the picture: one panel a text, or one of layer errors where nothing was evaluated.

    Args:
        cells: settings and results.
        dense: the dense model's perplexity on the texts of `[also]`.
        out: the PNG file.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    first = cells[0][1]
    texts: list[str | None] = [*(["evaluation"] if first["evaluation"] else []), *first["texts"]] or [None]
    figure, axes = plt.subplots(1, len(texts), figsize=(5.2 * len(texts), 3.6), squeeze=False, layout="constrained")
    for axis, text in zip(axes[0], texts, strict=True):
        for name, points in series(cells, text).items():
            labels, values, errors = zip(*points, strict=True)
            axis.errorbar(labels, values, yerr=errors, marker="o", capsize=3, linewidth=1.5, label=name)
        if text is not None:
            baseline = first["evaluation"]["dense"] if text == "evaluation" else dense[text]
            axis.axhline(baseline["value"], color="gray", linestyle="--", linewidth=1, label="dense")
            axis.set_yscale("log")
        source = Path(first["evaluation"]["source"]).name if text == "evaluation" else text
        axis.set_ylabel(f"perplexity, {source}" if text else "mean layer error")
        axis.set_xlabel(", ".join(dict.fromkeys(list(settings)[-1] for settings, _ in cells)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=8)
        axis.grid(axis="y", which="both", alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)
