"""Log-probs and entropies of given tokens from hidden states, without the logits of a whole microbatch.

The LM head is divided by vocabulary rows over the tensor axis.  Its logits exist for one chunk of tokens at a time,
in the forward and again in the backward, and in float32 from the product on, whatever the model's dtype.

Shape key:  S tokens to score, h hidden size, V vocabulary rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Head:
    """How the LM head is applied, and over which ranks it is divided."""

    group: dist.ProcessGroup
    """The tensor axis."""
    sequence_parallel: bool
    """Whether hidden states arrive as this rank's slice of s."""
    temperature: float
    """Log-probs are those of softmax(logits / temperature), as the engine samples."""
    chunk_tokens: int
    """Tokens whose logits exist at one time."""


def token_logp(
    hidden: Tensor, weight_Vh: Tensor, at_S: Tensor, label_S: Tensor, head: Head
) -> tuple[Tensor, Tensor]:
    """Log-probs of `label_S` and entropies of their distributions, both [S] float32, nats.

        z = hidden W^T / temperature      logp = z[label] - logsumexp(z)      entropy = logsumexp(z) - sum p z

    Args:
        hidden: [s, b, h], or this rank's slice of s under sequence parallelism.
        weight_Vh: this rank's rows of the head; rank r of the group holds rows [r V, (r + 1) V).
        at_S: positions in the flattened [s, b] of the *gathered* hidden states.

    Returns:
        The same numbers on every rank of the group; log-probs are differentiable in hidden and weight.
    """
    return _TokenLogp.apply(hidden, weight_Vh, at_S, label_S, head)  # type: ignore[no-any-return]


class _TokenLogp(torch.autograd.Function):
    """d logp / d z = (onehot - softmax) / temperature, recomputed chunk by chunk in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, at: Tensor, label: Tensor, head: Head
    ) -> tuple[Tensor, Tensor]:
        hidden_Sh = _gather(hidden, head).flatten(0, 1)[at]
        label = label - head.group.rank() * weight.shape[0]  # row in this rank's part, or out of it
        stats = torch.empty(4, len(at), device=hidden.device)  # max, sum e, sum e z, z[label]
        for part in _chunks(len(at), head.chunk_tokens):
            stats[:, part] = _local_stats(_logits(hidden_Sh[part], weight, head), label[part])
        logsumexp, entropy, target = _combine(stats, head.group)
        ctx.save_for_backward(hidden_Sh, weight, at, label, logsumexp)
        ctx.head, ctx.hidden_shape = head, hidden.shape
        ctx.mark_non_differentiable(entropy)
        return target - logsumexp, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_Sh, weight, at, label, logsumexp = ctx.saved_tensors
        head: Head = ctx.head
        grad_logp, _ = grad_outputs
        grad_Sh = torch.empty_like(hidden_Sh)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part in _chunks(len(at), head.chunk_tokens):
            softmax = (_logits(hidden_Sh[part], weight, head) - logsumexp[part, None]).exp_()
            grad_z = softmax.mul_(-grad_logp[part, None])
            inside = _is_inside(label[part], weight)
            grad_z[inside, label[part][inside]] += grad_logp[part][inside]
            grad_z = grad_z.div_(head.temperature).to(weight.dtype)
            grad_Sh[part] = grad_z @ weight
            grad_weight += grad_z.T @ hidden_Sh[part]
        return _scatter(grad_Sh, at, ctx.hidden_shape, head), grad_weight.to(weight.dtype), None, None, None


def _logits(hidden_Sh: Tensor, weight_Vh: Tensor, head: Head) -> Tensor:
    """[S, V] float32; a product rounded to bfloat16 would move log-probs by some hundredths of a nat."""
    if hidden_Sh.is_cuda and hidden_Sh.dtype == torch.bfloat16:
        z_SV = torch.mm(hidden_Sh, weight_Vh.T, out_dtype=torch.float32)
    else:
        z_SV = hidden_Sh.float() @ weight_Vh.float().T
    return z_SV / head.temperature


def _local_stats(z_SV: Tensor, label_S: Tensor) -> Tensor:
    """[4, S] of this rank's vocabulary rows: max, sum e^(z - max), sum e^(z - max) z, z[label] or 0."""
    top = z_SV.amax(-1)
    e = (z_SV - top[:, None]).exp_()
    inside = (label_S >= 0) & (label_S < z_SV.shape[1])
    target = z_SV.gather(1, label_S.clamp(0, z_SV.shape[1] - 1)[:, None])[:, 0] * inside
    return torch.stack([top, e.sum(-1), (e * z_SV).sum(-1), target])


def _combine(stats: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, entropy and label's logit over the whole vocabulary, from one all-gather of [4, S]."""
    size = group.size()
    parts = stats[None]
    if size > 1 and stats.numel():
        parts = stats.new_empty(size, *stats.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), stats, group=group)
    top, e, ez, target = parts.unbind(1)
    highest = top.amax(0)
    scale = (top - highest).exp()
    total = (e * scale).sum(0)
    logsumexp = highest + total.log()
    return logsumexp, logsumexp - (ez * scale).sum(0) / total, target.sum(0)


def _gather(hidden: Tensor, head: Head) -> Tensor:
    """[s, b, h] with all of s."""
    if not head.sequence_parallel or head.group.size() == 1:
        return hidden
    whole = hidden.new_empty(hidden.shape[0] * head.group.size(), *hidden.shape[1:])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=head.group)
    return whole


def _scatter(grad_Sh: Tensor, at: Tensor, shape: torch.Size, head: Head) -> Tensor:
    """The gradient of `hidden` as it arrived: each rank has the part of its own vocabulary rows, so sum over ranks."""
    size = head.group.size()
    sliced = head.sequence_parallel and size > 1
    whole = grad_Sh.new_zeros(shape[0] * (size if sliced else 1) * shape[1], shape[2])
    whole[at] = grad_Sh
    if sliced:
        mine = grad_Sh.new_empty(shape[0] * shape[1], shape[2])
        dist.reduce_scatter_tensor(mine, whole, group=head.group)
        return mine.view(shape)
    if size > 1:
        dist.all_reduce(whole, group=head.group)
    return whole.view(shape)


def _is_inside(label_S: Tensor, weight_Vh: Tensor) -> Tensor:
    return (label_S >= 0) & (label_S < weight_Vh.shape[0])


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
