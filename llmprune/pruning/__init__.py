"""The mathematics: masks, weights and channels from a Gram matrix (Hessian of the layer-wise loss).

Imports no transformers and no `torch.nn`; of this package `runtime` and `errors` only. A new method: one file in
`methods`; a new criterion: one file in `criteria`; a new pattern: a class in `pattern`. This file imports nothing.
"""
