"""Activations stream through one block at a time: capture, hooks, statistics, schedules, block-wise reconstruction.

May import `structure`, `model`, `pruning`, `runtime`. A new statistic: a field of `InputStats`, accumulated in
`pruning/statistics` and asked for by `needs`. A new stage of a block: a module here, called by `pipeline/steps`.
"""
