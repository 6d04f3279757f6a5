"""Chunked vocab-parallel log-probs against plain torch on one rank (two ranks: test_step.py, through the model)."""

from __future__ import annotations

import pytest
import torch

from megatron_vespo.trainer.logprobs import Head, token_logp


class OneRank:
    """The part of a process group that one rank needs."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def head(temperature=1.0, chunk_tokens=3):
    return Head(group=OneRank(), sequence_parallel=False, temperature=temperature, chunk_tokens=chunk_tokens)


def test_log_prob_and_entropy_of_a_hand_made_head():
    # logits 0, ln 2, ln 5 -> probabilities 1/8, 2/8, 5/8
    weight = torch.log(torch.tensor([[1.0], [2.0], [5.0]]))
    logp, entropy = token_logp(torch.ones(1, 1, 1), weight, torch.tensor([0]), torch.tensor([2]), head())
    p = torch.tensor([1 / 8, 2 / 8, 5 / 8])
    torch.testing.assert_close(logp, p[2:].log())
    torch.testing.assert_close(entropy, -(p * p.log()).sum()[None])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_values_and_gradients_are_those_of_full_logits(temperature, chunk_tokens):
    torch.manual_seed(0)
    hidden = torch.randn(5, 2, 8, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(11, 8).requires_grad_()
    at, label = torch.tensor([9, 0, 3, 4, 6]), torch.tensor([0, 10, 5, 5, 2])
    upstream = torch.randn(5)

    logp, entropy = token_logp(hidden, weight, at, label, head(temperature, chunk_tokens))
    mine = torch.autograd.grad(logp, (hidden, weight), upstream)

    everything = torch.log_softmax(hidden.flatten(0, 1)[at] @ weight.T / temperature, -1)
    expected = everything[torch.arange(5), label]
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, -(everything.exp() * everything).sum(-1))
    for got, want in zip(mine, torch.autograd.grad(expected, (hidden, weight), upstream), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_log_probs_of_bfloat16_weights_are_not_rounded_to_bfloat16():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 1, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    at, label = torch.arange(6), torch.arange(6) * 9
    logp, entropy = token_logp(hidden, weight, at, label, head())
    everything = torch.log_softmax(hidden[:, 0].double() @ weight.double().T, -1)
    assert (logp - everything[at, label]).abs().max() < 1e-5
    assert (entropy + (everything.exp() * everything).sum(-1)).abs().max() < 1e-5


def test_logits_of_a_hundred_thousand_nats_stay_finite():
    weight = torch.tensor([[1e5], [-1e5]])
    logp, entropy = token_logp(torch.ones(1, 1, 1), weight, torch.tensor([0]), torch.tensor([1]), head())
    assert logp.item() == -2e5 and entropy.item() == 0.0


def test_a_microbatch_without_responses_has_zero_gradient():
    hidden, weight = torch.randn(2, 1, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    logp, _ = token_logp(hidden, weight, nothing, nothing, head())
    logp.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()
