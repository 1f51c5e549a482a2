"""Training a pruned model: distillation from the dense one, fine-tuning that holds zeros, LoRA that keeps the mask.

Of this package imports `errors` only. A new way to train: one module here.
"""
