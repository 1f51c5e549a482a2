# %% [markdown]
# # Prune a model in several ways and compare
#
# Each cell runs by itself in VS Code, Spyder or Jupyter (through jupytext); `python examples/prune_and_compare.py` runs
# them all. With the demo model it takes some minutes on two CPU cores. `MODEL` and `TEXT` in the environment name
# another model and another text to calibrate and to measure on.

# %%
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune import Job, ProgressBars, PruneReport, prune

MODEL = os.environ.get("MODEL", "demo")
TEXT = os.environ.get("TEXT")  # None: what goes with the model

# %% [markdown]
# A `Job` has the command line's flags as fields; `prune` writes a folder and returns the report that stands in it.
# Leaving out `method` gives the default recipe; `effort="best"` takes longer and gives more.

# %%
reports: dict[str, PruneReport] = {}
for method in ("magnitude", "wanda", "sparsegpt", "auto"):
    job = Job(
        MODEL,
        "2:4",
        method,
        calib=TEXT,
        eval_text=TEXT,
        samples=16,
        eval_windows=8,
        out=Path(f"pruned-{method}"),
        overwrite=True,
    )
    reports[method] = prune(job, ProgressBars(leave=False))

# %% [markdown]
# What each costs and what it leaves of the model.

# %%
for method, report in reports.items():
    assert report.evaluation
    dense, pruned = (report.evaluation[key]["value"] for key in ("dense", "pruned"))
    print(
        f"{method:<10} perplexity {dense:8.2f} -> {pruned:8.2f}   "
        f"mean layer error {report.mean_error:.4f}   {report.seconds['prune']:5.0f} s"
    )

# %% [markdown]
# Where it hurts: the layers with the largest relative output error.

# %%
for layer in sorted(reports["auto"].layers, key=lambda layer: -layer.error)[:5]:
    print(f"{layer.error:.3f}  {layer.name}")

# %% [markdown]
# The folder is a plain transformers model. In a notebook, `reports["auto"]` alone on a line shows the run as a table.

# %%
folder = reports["auto"].out
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
prompt = tokenizer("My fellow Americans,", return_tensors="pt").input_ids
with torch.no_grad():
    print(tokenizer.decode(model.generate(prompt, max_new_tokens=20, do_sample=False)[0]))
