"""The loss of distillation against formulas written out, and what it does to memory, gradients and states."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from helpers import random_tokens, tiny_model
from torch import Tensor, nn

from llmprune.training import logits as logits_module
from llmprune.training.distillation import Cached, Distilled, Loss, Recomputed
from llmprune.training.divergence import Top, divergence, divergence_from_top
from llmprune.training.logits import two_parts

CPU = torch.device("cpu")
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def written_out(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """The divergence, term by term."""
    total = 0.0
    for s, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        q = [math.exp(value / temperature) for value in s]
        p = [math.exp(value / temperature) for value in t]
        pairs = [(a / sum(p), b / sum(q)) for a, b in zip(p, q, strict=True)]
        total += temperature**2 * sum(a * math.log(a / b) for a, b in pairs)
    return total


def random_logits(seed: int, positions: int = 5, vocabulary: int = 11) -> Tensor:
    return 2 * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_divergence_is_the_formula(temperature: float) -> None:
    student, teacher = random_logits(0), random_logits(1)
    assert float(divergence(student, teacher, temperature)) == pytest.approx(
        written_out(student, teacher, temperature), rel=1e-5
    )
    assert float(divergence(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_from_the_largest_joins_all_others(temperature: float) -> None:
    student, teacher = random_logits(0).double(), random_logits(1).double()
    whole = float(divergence(student, teacher, temperature))
    found = []
    for count in range(1, 12):
        top = Top.of(teacher, count, temperature)
        q, p = ((value / temperature).softmax(-1) for value in (student, teacher))
        wanted = 0.0
        for position, tokens in enumerate(top.tokens.tolist()):
            others = [token for token in range(11) if token not in tokens]
            events = [[token] for token in tokens] + ([others] if others else [])
            for event in events:
                a, b = float(p[position, event].sum()), float(q[position, event].sum())
                wanted += temperature**2 * a * math.log(a / b)
        found.append(float(divergence_from_top(student, top, temperature)))
        assert found[-1] == pytest.approx(wanted, rel=1e-6)
    assert all(before <= after + 1e-9 for before, after in pairwise(found))
    assert found[-1] == pytest.approx(whole, rel=1e-6)


def distilled(student: nn.Module, teacher: nn.Module, loss: Loss) -> Distilled:
    return Distilled(student, (Recomputed(teacher, CPU), Recomputed(teacher, CPU)), loss, CPU)


def loss_by_hand(student: nn.Module, teacher: nn.Module, tokens: Tensor, loss: Loss) -> Tensor:
    """The mean loss of whole logits."""
    with torch.no_grad():
        wanted = teacher(input_ids=tokens).logits.float()
    logits = student(input_ids=tokens).logits.float()
    q, p = ((value / loss.temperature).log_softmax(-1) for value in (logits, wanted))
    kl = loss.temperature**2 * (p.exp() * (p - q)).sum(-1).mean()
    entropy = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return (1 - loss.mix) * kl + loss.mix * entropy


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_whole_logits(family: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", 500)
    student, teacher = (tiny_model(family, seed, tie_word_embeddings=tied, **NO_DROPOUT) for seed in (0, 1))
    tokens, loss = random_tokens(2, 9), Loss(2.0, 0.3)
    wanted = loss_by_hand(student, teacher, tokens, loss)
    names, parameters = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(wanted, parameters, allow_unused=True)
    model = distilled(student, teacher, loss).train()
    found = model(tokens, torch.arange(2))["loss"]
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    found.backward()
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        if gradient is not None:
            assert parameter.grad is not None, name
            assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6), name


def test_in_evaluation_it_is_the_divergence_alone() -> None:
    student, teacher = tiny_model("llama", 0), tiny_model("llama", 1)
    tokens = random_tokens(2, 9)
    model = distilled(student, teacher, Loss(2.0, 0.3)).eval()
    with torch.no_grad():
        found = model(tokens, torch.arange(2))["loss"]
        assert float(found) == pytest.approx(float(loss_by_hand(student, teacher, tokens, Loss())), rel=1e-5)


def test_models_that_cap_their_logits_are_taken_whole() -> None:
    assert two_parts(tiny_model("llama"), CPU).parameters
    assert not two_parts(tiny_model("gemma2", final_logit_softcapping=0.5), CPU).parameters


def test_all_probabilities_kept_are_the_teacher() -> None:
    student, teacher = tiny_model("llama", 0), tiny_model("llama", 1)
    tokens, rows = random_tokens(2, 9), torch.arange(2)
    recomputed = Recomputed(teacher, CPU)
    tops = [recomputed.top(tokens[row : row + 1], 10**6, 2.0) for row in range(2)]
    losses = [
        Distilled(student, (one, recomputed), Loss(2.0), CPU).train()(tokens, rows)["loss"]
        for one in (recomputed, Cached(tops.__getitem__))
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)


def test_the_teacher_is_no_part_of_the_state_and_ties_are_kept_once() -> None:
    student, teacher = tiny_model("llama", 0, tie_word_embeddings=True), tiny_model("llama", 1)
    model = distilled(student, teacher, Loss())
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert len(list(model.parameters())) == len(list(student.parameters()))
    model.load_state_dict(state)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
