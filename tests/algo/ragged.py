"""Responses of different lengths in both layouts: packed, as the package computes, and padded, as papers and TRL write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vespo.algo.coefficients import Ratios, coefficient
from megatron_vespo.algo.loss import policy_loss, token_weights
from megatron_vespo.config import Aggregation, AlgorithmConfig


@dataclass(frozen=True)
class Ragged:
    """B responses; all float64."""

    log_mu: Sequence[Tensor]
    log_pi: Sequence[Tensor]
    advantage_B: Tensor

    def __getitem__(self, order: Sequence[int]) -> Ragged:
        """These responses, in this order."""
        return Ragged(
            [self.log_mu[i] for i in order], [self.log_pi[i] for i in order], self.advantage_B[list(order)]
        )

    @property
    def num_tokens(self) -> list[int]:
        return [len(x) for x in self.log_mu]

    @property
    def seq_S(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.log_mu)), torch.tensor(self.num_tokens))

    @property
    def mask_BT(self) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in self.log_mu], batch_first=True)

    def padded(self) -> tuple[Tensor, Tensor]:
        """log pi, which is to be differentiated, and log mu: [B, T], with junk where there is no token."""
        pi, mu = (
            torch.nn.utils.rnn.pad_sequence(list(x), batch_first=True, padding_value=junk)
            for x, junk in ((self.log_pi, -3.0), (self.log_mu, -1.0))
        )
        return pi.requires_grad_(), mu

    def ratios(self) -> Ratios:
        return ratios([pi - mu for pi, mu in zip(self.log_pi, self.log_mu, strict=True)])


def ratios(
    log_ratios: Sequence[Tensor], log_rhos: Sequence[Tensor] | None = None, noise: float = 0.0
) -> Ratios:
    """Of sequences, each given by its tokens' log ratios."""
    lengths = torch.tensor([len(x) for x in log_ratios])
    rho_S = None if log_rhos is None else torch.cat(list(log_rhos))
    return Ratios(
        log_ratio_S=torch.cat(list(log_ratios)),
        log_w_N=torch.stack([x.double().sum() for x in log_ratios]),
        num_tokens_N=lengths.double(),
        seq_S=torch.repeat_interleave(torch.arange(len(log_ratios)), lengths),
        log_rho_S=rho_S,
        log_rho_N=None if log_rhos is None else torch.stack([x.double().sum() for x in log_rhos]),
        noise_variance=noise,
    )


def whole(log_w: Sequence[float], tokens: int = 1) -> Ratios:
    """Sequences of so many tokens, given by their log W alone."""
    return ratios([torch.full((tokens,), x / tokens, dtype=torch.float64) for x in log_w])


def random_batch(seed: int, scale: float, num: int = 6) -> Ragged:
    """Lengths 1 to 7, log ratios of this size, advantages of both signs and one of 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, 8, (num,), generator=generator).tolist()
    mu = [-normal(n).abs() for n in lengths]
    advantage = normal(num)
    advantage[:3] = torch.tensor([0.0, 1.5, -0.5])
    return Ragged(mu, [x + scale * normal(len(x)) for x in mu], advantage)


def loss_and_gradient(
    algorithm: AlgorithmConfig, batch: Ragged, aggregation: Aggregation | None = None
) -> tuple[Tensor, Tensor]:
    """What the package trains with: the loss, and d loss / d log pi of the packed tokens."""
    logp_S = torch.cat(list(batch.log_pi)).requires_grad_()
    c_S = coefficient(algorithm, batch.ratios(), batch.advantage_B)
    weight_B = torch.from_numpy(
        token_weights(batch.num_tokens, aggregation or algorithm.resolved_aggregation)
    )
    loss = policy_loss(logp_S, c_S, batch.advantage_B[batch.seq_S], weight_B[batch.seq_S])
    loss.backward()
    assert logp_S.grad is not None
    return loss.detach(), logp_S.grad
