"""Activations stream through one block at a time: capture, hooks, statistics, schedules, block-wise reconstruction.

May import `reporting` and all below it. A new statistic: a field of `InputStats`, accumulated in `pruning/statistics`,
summed over processes in `statistics`, and asked for by `needs`. A new stage of a block: a module here, called by
`pipeline/steps`.
"""
