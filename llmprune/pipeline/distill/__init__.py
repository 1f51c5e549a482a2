"""Distillation of a pruned folder, from a `DistillJob` to a finished folder.

The loss and what is trained are in `training`; here are checks, windows, checkpoints, report. The story is in `run`.
"""
