"""Training a pruned model with other tools: zeros are held, LoRA adapters keep the mask.

Imports torch and peft only. A new way to train: one module here.
"""
