"""The loss of distillation: how far a model's next-token distribution is from another's.

Source: Hinton, Vinyals and Dean 2015, whose factor T² keeps gradients of one size at all temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LEAST = 1e-12
"""A probability that is smaller counts as this, where its logarithm is taken."""


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """`T² Σ p (log p − log q)` of `p = softmax(t / T)` and `q = softmax(s / T)`, summed over all positions.

    Args:
        student: logits s, `(positions, vocabulary)`, float32.
        teacher: logits t, likewise.
        temperature: T.
    """
    q, p = (logits.div(temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * functional.kl_div(q, p, reduction="sum", log_target=True)


@dataclass(frozen=True, slots=True)
class Top:
    """The largest probabilities of a distribution over the vocabulary.

    Args:
        tokens: `(positions, k)`, int32.
        logarithms: of their probabilities, `(positions, k)`, float32.
    """

    tokens: Tensor
    logarithms: Tensor

    @classmethod
    def of(cls, logits: Tensor, count: int, temperature: float = 1.0) -> Top:
        """The `count` largest of `softmax(t / T)`, of logits `(positions, vocabulary)`."""
        found = logits.div(temperature).log_softmax(-1).topk(min(count, logits.shape[-1]))
        return cls(found.indices.int(), found.values)


def divergence_from_top(student: Tensor, teacher: Top, temperature: float = 1.0) -> Tensor:
    """The divergence of two distributions over the teacher's k largest tokens and one event for all others.

    Joining events never raises a Kullback–Leibler divergence, so this is at most `divergence`.

    Args:
        student: logits, `(positions, vocabulary)`, float32.
        teacher: at the same temperature.
        temperature: T.
    """
    q = student.div(temperature).log_softmax(-1).gather(-1, teacher.tokens.long())
    p = teacher.logarithms
    other_q, other_p = (1 - logarithms.exp().sum(-1) for logarithms in (q, p))
    others = torch.xlogy(other_p.clamp_min(0), other_p.clamp_min(LEAST) / other_q.clamp_min(LEAST))
    return temperature**2 * ((p.exp() * (p - q)).sum() + others.sum())
