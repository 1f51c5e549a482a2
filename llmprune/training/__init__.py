"""Training a pruned model with other tools: zeros are held, LoRA adapters keep the mask.

Of this package imports `errors` only. A new way to train: one module here.
"""
