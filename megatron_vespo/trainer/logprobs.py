"""Log-probs, entropies and top-k masses of given tokens from hidden states, without the logits of a whole microbatch.

The LM head is divided by vocabulary rows over the tensor axis.  Logits exist one tile (some tokens, some rows) at a
time, in the forward and again in the backward, and in float32 from the product on, whatever the model's dtype.

Shape key:  s b positions of the microbatch, S tokens to score, h hidden size, V vocabulary rows of this rank,
            t tokens and v rows of one tile, k most likely tokens, R tensor ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

TILE_ROWS = 8192
"""Vocabulary rows of one tile: wide enough that products run at full speed, and with the head read, converted from
bfloat16 (on CPU) and its gradient written once per pass, however few tokens a tile has."""

MAX, SUM_E, SUM_EX, TARGET, TOP = range(5)
"""Rows of the statistics of a part of the vocabulary: m = max z, sum e^(z - m), sum e^(z - m) (z - m), z[label] or 0, and
from TOP on the k largest z (-inf where the part has fewer)."""


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
    """Size of a tile of logits: as many as this many tokens have over this rank's vocabulary."""
    top_k: int = 0
    """Also give the probability of this many most likely tokens together; 0: not computed."""


class TokenStats(NamedTuple):
    """Of S tokens, float32, the same numbers on every rank of the group."""

    logp: Tensor
    """[S] nats, differentiable."""
    entropy: Tensor
    """[S] nats, of the distribution the token was drawn from; differentiable."""
    top_k_mass: Tensor | None
    """[S] probability of the top_k most likely tokens of the whole vocabulary; no gradient.  None for top_k = 0."""


def token_stats(hidden: Tensor, weight_Vh: Tensor, at_S: Tensor, label_S: Tensor, head: Head) -> TokenStats:
    """Log-probs of `label_S`, with entropy and top-k mass of their distributions.

        z = hidden W^T / temperature     logp = z[label] - logsumexp(z)     entropy = logsumexp(z) - sum_j p_j z_j

    Gradients are exact; tokens whose upstream gradient is 0 cost nothing in the backward.  Alive at one time, beside the
    gradients themselves: two tiles of float32 logits (in the backward one, without a gradient of entropies; on CUDA a
    bfloat16 model has one more in its own dtype), some [S, h], and two blocks of TILE_ROWS of the head.  Saved: [S].
    Collective over the group, once forward and once backward, and one gather more for each under sequence parallelism.

    Args:
        hidden: [s, b, h], or this rank's slice of s under sequence parallelism.
        weight_Vh: this rank's rows of the head, as many on every rank; rank r of the group holds rows [r V, (r + 1) V).
        at_S: positions in the flattened [s, b] of the *gathered* hidden states.
        label_S: token ids of the whole vocabulary.
    """
    return TokenStats(*_TokenStats.apply(hidden, weight_Vh, at_S, label_S, head))  # type: ignore[misc]


class _TokenStats(torch.autograd.Function):
    """Keeps its inputs and [S] statistics; hidden states are gathered again in the backward, not kept gathered."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, at: Tensor, label: Tensor, head: Head
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        label = label - head.group.rank() * weight.shape[0]  # row in this rank's part, or out of it
        hidden_Sh = _gather(hidden, head).flatten(0, 1)[at]
        stats = _over_ranks(_local_stats(hidden_Sh, weight, label, head), head.group)
        log_e = stats[SUM_E].log()
        logp, entropy = stats[TARGET] - stats[MAX] - log_e, log_e - stats[SUM_EX] / stats[SUM_E]
        ctx.save_for_backward(hidden, weight, at, label, stats[MAX].clone(), stats[SUM_E].clone(), entropy)
        ctx.head = head
        ctx.set_materialize_grads(False)
        if not head.top_k:
            return logp, entropy, None
        mass = (stats[TOP:] - stats[MAX]).exp_().sum(0) / stats[SUM_E]
        ctx.mark_non_differentiable(mass)
        return logp, entropy, mass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logp, grad_entropy, _ = grad_outputs
        hidden, weight, at, label, top, sum_e, entropy = ctx.saved_tensors
        head: Head = ctx.head
        if grad_logp is None:
            grad_logp = torch.zeros_like(entropy)
        active = _nonzero(grad_logp, grad_entropy)
        tokens = _tokens(label, top, sum_e, entropy, grad_logp, grad_entropy, head.temperature).pick(active)
        at = at[active]
        hidden_Sh = _gather(hidden, head).flatten(0, 1)[at]
        grad_Sh, grad_weight = _gradients(hidden_Sh, weight, tokens, head)
        del hidden_Sh
        return _scatter(grad_Sh, at, hidden, head), grad_weight, None, None, None


# -------------------------------------------------------------------------------------------------------- forward


def _local_stats(hidden_Sh: Tensor, weight: Tensor, label_S: Tensor, head: Head) -> Tensor:
    """[TOP + k, S] of this rank's vocabulary rows."""
    blocks, parts = _tiling(hidden_Sh, weight, head)
    stats = hidden_Sh.new_full((len(blocks), TOP + head.top_k, len(label_S)), -torch.inf, dtype=torch.float32)
    logits, scratch = _Tile(hidden_Sh, weight, head), _Tile(hidden_Sh, weight, head)
    for block, rows in enumerate(blocks):
        weight_vh = _operand(weight[rows])
        for part in parts:
            z_tv = logits.product(hidden_Sh[part], weight_vh)
            here = stats[block, :, part]
            if head.top_k:
                top = z_tv.topk(min(head.top_k, z_tv.shape[1]), sorted=False).values
                here[TOP : TOP + top.shape[1]] = top.T
            _tile_stats(here, z_tv, scratch.like(z_tv), label_S[part] - rows.start)
    return _merged(stats)


def _tile_stats(stats: Tensor, z_tv: Tensor, scratch_tv: Tensor, label_t: Tensor) -> None:
    """Fill rows MAX to TARGET; overwrites the logits."""
    inside, column = _column(label_t, z_tv)
    stats[TARGET] = z_tv.gather(1, column)[:, 0].where(inside, 0.0)
    stats[MAX] = z_tv.amax(-1)
    x_tv = z_tv.sub_(stats[MAX][:, None])  # sums of z itself would cancel where logits are large
    e_tv = torch.exp(x_tv, out=scratch_tv)
    stats[SUM_E] = e_tv.sum(-1)
    stats[SUM_EX] = e_tv.mul_(x_tv).sum(-1)


def _merged(parts: Tensor) -> Tensor:
    """Statistics of the union of parts of the vocabulary: [P, TOP + k, S] -> [TOP + k, S]."""
    top, e, ex, target = parts[:, :TOP].unbind(1)
    highest = top.amax(0)
    shift = top - highest
    scale = shift.exp()
    sums = [(e * scale).sum(0), ((ex + e * shift) * scale).sum(0), target.sum(0)]
    largest = parts[:, TOP:].flatten(0, 1).topk(parts.shape[1] - TOP, dim=0, sorted=False).values
    return torch.cat([torch.stack([highest, *sums]), largest])


def _over_ranks(stats: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Statistics of the whole vocabulary, from one all-gather."""
    if group.size() == 1 or not stats.numel():
        return stats
    parts = stats.new_empty(group.size(), *stats.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), stats, group=group)
    return _merged(parts)


# ------------------------------------------------------------------------------------------------------- backward


class _Tokens(NamedTuple):
    """What turns the logits of a token into their gradient; [S] each.

        d logp / d z_j = [j = label] - p_j         d entropy / d z_j = -p_j (log p_j + entropy)
        p_j = e_j / sum e,  e_j = exp(z_j - m),  log p_j = z_j - m - log(sum e)

    so that for upstream gradients g and q, divided by the temperature because z is,

        grad_j = g [j = label] + e_j (constant + slope (z_j - m))
        constant = -(g + q (entropy - log(sum e))) / sum e         slope = -q / sum e
    """

    label: Tensor
    top: Tensor
    g: Tensor
    constant: Tensor
    slope: Tensor | None
    """None: no gradient of entropies is asked for, and none is paid for."""

    def pick(self, index: Tensor | slice) -> _Tokens:
        return _Tokens(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]


def _tokens(
    label: Tensor,
    top: Tensor,
    sum_e: Tensor,
    entropy: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
) -> _Tokens:
    g = grad_logp / temperature
    if grad_entropy is None:
        return _Tokens(label, top, g, -g / sum_e, None)
    q = grad_entropy / temperature
    return _Tokens(label, top, g, -(g + q * (entropy - sum_e.log())) / sum_e, -q / sum_e)


def _nonzero(grad_logp: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """Tokens with any upstream gradient: the others (advantage or phi(W) of 0, say) contribute exactly nothing."""
    active = grad_logp != 0
    if grad_entropy is not None:
        active |= grad_entropy != 0
    return active.nonzero()[:, 0]


def _gradients(hidden_Sh: Tensor, weight: Tensor, tokens: _Tokens, head: Head) -> tuple[Tensor, Tensor]:
    """This rank's part of the gradient of hidden_Sh, float32, and the gradient of its rows of the head.

    Rows of the head are the outer loop: a row's gradient is summed over all tokens in float32 before it is rounded
    to the dtype of the head, and needs no float32 copy of the whole head.
    """
    blocks, parts = _tiling(hidden_Sh, weight, head)
    grad_Sh = torch.zeros_like(hidden_Sh, dtype=torch.float32)
    grad_weight = torch.empty_like(weight)
    sums = torch.empty_like(weight[: blocks[0].stop], dtype=torch.float32)
    logits = _Tile(hidden_Sh, weight, head)
    scratch = logits if tokens.slope is None else _Tile(hidden_Sh, weight, head)
    for rows in blocks:
        weight_vh = _operand(weight[rows])
        sums_vh = sums[: len(weight_vh)].zero_()
        for part in parts:
            hidden_th, here = _operand(hidden_Sh[part]), tokens.pick(part)
            z_tv = logits.product(hidden_th, weight_vh)
            grad_tv = _grad_logits(z_tv, scratch.like(z_tv), here, rows.start).to(weight_vh.dtype)
            _add_product(grad_Sh[part], grad_tv, weight_vh)
            _add_product(sums_vh, grad_tv.T, hidden_th)
        grad_weight[rows] = sums_vh
    return grad_Sh, grad_weight


def _grad_logits(z_tv: Tensor, scratch_tv: Tensor, tokens: _Tokens, first_row: int) -> Tensor:
    """In place of the logits (and, for the gradient of entropies, with a scratch tile)."""
    x_tv = z_tv.sub_(tokens.top[:, None])
    if tokens.slope is None:
        grad_tv = x_tv.exp_().mul_(tokens.constant[:, None])
    else:
        e_tv = torch.exp(x_tv, out=scratch_tv)
        grad_tv = x_tv.mul_(tokens.slope[:, None]).add_(tokens.constant[:, None]).mul_(e_tv)
    inside, column = _column(tokens.label - first_row, grad_tv)
    return grad_tv.scatter_add_(1, column, tokens.g.where(inside, 0.0)[:, None])


# ---------------------------------------------------------------------------------------------- tiles and products


class _Tile:
    """Memory of one tile, used again for every tile: fresh memory costs page faults on CPU."""

    def __init__(self, hidden_Sh: Tensor, weight: Tensor, head: Head) -> None:
        blocks, parts = _tiling(hidden_Sh, weight, head)
        size = max((rows.stop - rows.start for rows in blocks), default=0) * max(
            (part.stop - part.start for part in parts), default=0
        )
        self._memory = hidden_Sh.new_empty(size, dtype=torch.float32)
        self._temperature = head.temperature

    def like(self, tile: Tensor) -> Tensor:
        return self._memory[: tile.numel()].view(tile.shape)

    def product(self, hidden_th: Tensor, weight_vh: Tensor) -> Tensor:
        """Logits of one tile."""
        hidden_th = _operand(hidden_th)
        z_tv = self._memory[: len(hidden_th) * len(weight_vh)].view(len(hidden_th), len(weight_vh))
        _add_product(z_tv, hidden_th, weight_vh.T, beta=0, alpha=1 / self._temperature)
        return z_tv


def _tiling(hidden_Sh: Tensor, weight: Tensor, head: Head) -> tuple[list[slice], list[slice]]:
    """Blocks of vocabulary rows and parts of the tokens; the first of each is the largest."""
    num_rows = min(TILE_ROWS, len(weight))
    num_tokens = head.chunk_tokens * len(weight) // num_rows
    return list(_slices(len(weight), num_rows)), list(_slices(len(hidden_Sh), num_tokens))


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _operand(x: Tensor) -> Tensor:
    """As a factor of `_add_product`: CPUs have no product of bfloat16 with a float32 result."""
    return x if x.is_cuda else x.float()


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> None:
    """out = beta out + alpha a b, in float32: logits rounded to bfloat16 would move log-probs by some hundredths."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out_dtype=torch.float32, out=out)


def _column(label_t: Tensor, tile_tv: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each label is in the tile, and [t, 1] its column (any, if not): no mask whose size the host must know."""
    last = tile_tv.shape[1] - 1
    return (label_t >= 0) & (label_t <= last), label_t.clamp(0, last)[:, None]


# -------------------------------------------------------------------------------------------------- sequence slices


def _gather(hidden: Tensor, head: Head) -> Tensor:
    """[s, b, h] with all of s."""
    if not head.sequence_parallel or head.group.size() == 1:
        return hidden
    whole = hidden.new_empty(hidden.shape[0] * head.group.size(), *hidden.shape[1:])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=head.group)
    return whole


def _scatter(grad_Sh: Tensor, at: Tensor, hidden: Tensor, head: Head) -> Tensor:
    """The gradient of `hidden` as it arrived: each rank has the part of its own vocabulary rows, so sum over ranks."""
    size, shape = head.group.size(), hidden.shape
    sliced = head.sequence_parallel and size > 1
    whole = grad_Sh.new_zeros(shape[0] * (size if sliced else 1) * shape[1], shape[2])
    whole.index_add_(0, at, grad_Sh)
    if sliced:
        mine = whole.new_empty(shape[0] * shape[1], shape[2])
        dist.reduce_scatter_tensor(mine, whole, group=head.group)
        whole = mine
    elif size > 1:
        dist.all_reduce(whole, group=head.group)
    return whole.view(shape).to(hidden.dtype)
