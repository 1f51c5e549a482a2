"""A model without its weights: skeleton, checkpoint, blocks, layers; safetensors in and out, tensor by tensor.

May import `pruning`, `runtime`. A new family: nothing, mostly; `blocks` has the general rule.
"""
