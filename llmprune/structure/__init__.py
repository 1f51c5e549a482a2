"""Coupled channels (DepGraph): found, permuted and sliced, and a config that expresses the sizes left.

May import `model` and all below it. No class of a model is named: couplings are guessed from gradients and verified by
running the block. A new kind of removal: a kind in `pruning/sparsity`, a planner here.
"""
