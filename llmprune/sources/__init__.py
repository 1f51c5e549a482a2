"""Sources of models (folder, Hub, GGUF, demo wheel), texts, tokens, self-generated text.

May import `model`, `pruning`, `runtime`. A new data set: a line in `texts.DATASETS`. A new model format: one module
here that makes a Hugging Face folder of it.
"""
