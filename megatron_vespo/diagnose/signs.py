"""What the rules of causes.py look at: the sampled tokens and processed rows whose weights were the same on both sides.

Shape key:  n sampled tokens whose version gap is 0 or unknown, R rows of routed sequences, L layers, K experts per token,
            B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.diagnose.aligned import Aligned, within
from megatron_vespo.evidence import Evidence
from megatron_vespo.types import Doubles, Experts, Ints, Mask

_ENOUGH = 16
"""Sequences without a weight push in between; after one, tokens still hang on what older weights left in the cache."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """[n] each; log-probs in nats, nan where not recorded."""

    sequence: Ints
    token: Ints
    """Ids."""
    row: Ints
    """Of R: what the log-prob hangs on; -1 where the sequence has no routes."""
    is_new: Mask
    """The first time that this token came after exactly this context; engines that repeat themselves say nothing new after that."""
    behavior: Doubles
    """M"""
    engine: Doubles
    """M'"""
    trainer: Doubles
    """A, or the log-prob as the trainer trains where A is not recorded."""
    repeat: Doubles
    """A2"""
    replayed: Doubles
    """B"""
    entropy: Doubles

    @property
    def gap(self) -> Doubles:
        """A - M"""
        return self.trainer - self.behavior

    @property
    def phase(self) -> Doubles:
        """M' - M: what changed inside the engine between sampling and scoring."""
        return self.engine - self.behavior

    @property
    def rescored_gap(self) -> Doubles:
        """A - M'"""
        return self.trainer - self.engine


@dataclass(frozen=True, kw_only=True)
class Rows:
    """[R] each."""

    sequence: Ints
    position: Ints
    """In the sequence."""
    from_end: Ints
    """Of the prompt: 0 is its last token, 1 the one before; negative in the response."""
    is_fresh: Mask
    """Of sequences that were sampled with the trainer's own weights, as far as is known."""
    trainer: Experts | None
    """[R, L, K] the trainer's free choice; where that is not recorded its shadow choice."""
    flips: Doubles
    """[R, L] 1 where the trainer and the engine, when it sampled, chose different sets; nan where one is not known."""
    engine_flips: Doubles
    """[R, L] the same against the engine's prefill."""


def tokens_of(evidence: Evidence) -> Tokens:
    """The sampled tokens of sequences that the trainer's own weights sampled; where those are few, of parts of sequences too."""
    aligned = Aligned(evidence)
    sequence = aligned.sequence_S
    whole = _fresh_sequences(evidence)
    if whole.sum() >= _ENOUGH or evidence.version_gap is None:
        fresh = evidence.is_sampled & whole[sequence]
    else:
        fresh = evidence.is_sampled & (evidence.version_gap == 0)
    trainer = evidence.policy_logp if evidence.natural_logp is None else evidence.natural_logp
    missing = np.full(len(sequence), np.nan, np.float32)

    def column(values: NDArray[np.float32] | None) -> Doubles:
        return (missing if values is None else values)[fresh].astype(np.float64)

    return Tokens(
        sequence=sequence[fresh],
        token=evidence.tokens[aligned.token_S[fresh]],
        row=np.where(evidence.num_prompt[sequence] > 0, aligned.row_S, -1)[fresh],
        is_new=_is_new(aligned, fresh),
        behavior=column(evidence.behavior_logp),
        engine=column(evidence.engine_logp),
        trainer=column(trainer),
        repeat=column(evidence.repeat_logp),
        replayed=column(evidence.replayed_logp),
        entropy=column(evidence.entropy),
    )


def rows_of(evidence: Evidence) -> Rows:
    """The rows of all routed sequences."""
    aligned = Aligned(evidence)
    sequence = aligned.sequence_R
    known = evidence.experts
    trainer = known.get("natural", known.get("shadow"))
    shape = next(iter(known.values())).shape[:2] if known else (len(sequence), 0)
    return Rows(
        sequence=sequence,
        position=aligned.position_R,
        from_end=-aligned.prompt_end_R,
        is_fresh=_fresh_sequences(evidence)[sequence],
        trainer=trainer,
        flips=_flips(trainer, known.get("behavior"), shape),
        engine_flips=_flips(trainer, known.get("engine"), shape),
    )


def clustered_mean(values: Doubles, cluster: Ints) -> tuple[float, float]:
    """The mean, and its standard error where values of one cluster (a sequence) may hang together; nan is left out."""
    known = np.isfinite(values)
    values, cluster = values[known], cluster[known]
    if len(values) == 0:
        return np.nan, np.inf
    mean = float(values.mean())
    sums = np.bincount(cluster, weights=values - mean)
    num = len(np.unique(cluster))
    return mean, float(np.sqrt(np.square(sums).sum() * num / max(1, num - 1)) / len(values))


def mean_square(values: Doubles) -> float:
    """Over what is known; nan where nothing is."""
    known = values[np.isfinite(values)]
    return float(np.square(known).mean()) if len(known) else np.nan


def share_by_token(gap: Doubles, tokens: Tokens) -> tuple[float, float]:
    """The share of a gap that is a function of the token's id alone, and how many standard errors that is from none.

    Other weights or another context move the same token in the same direction again and again; rounding does not.
    It is the intraclass correlation of the gap relative to (1 - p), where any change of a model is proportional to that.
    """
    known = np.isfinite(gap) & tokens.is_new
    size = gap[known] / (1.02 - np.exp(tokens.trainer[known]))
    _, group = np.unique(tokens.token[known], return_inverse=True)
    repeated = np.bincount(group)[group] > 1 if len(group) else np.zeros(0, bool)
    _, group = np.unique(group[repeated], return_inverse=True)
    count = np.bincount(group)
    num, num_groups = len(group), len(count)
    scale = float(np.sqrt(np.square(size).mean())) if num else 0.0
    if num_groups < 5 or num < 100 or scale == 0:
        return 0.0, 0.0
    value = np.clip(size[repeated] / scale, -5, 5)
    mean = np.bincount(group, weights=value) / count
    between = float((count * np.square(mean - value.mean())).sum()) / (num_groups - 1)
    within = float(np.square(value - mean[group]).sum()) / (num - num_groups)
    typical = (num - np.square(count).sum() / num) / (num_groups - 1)
    error = np.sqrt(2 / (num_groups - 1) + 2 / (num - num_groups))
    return (between - within) / (between + (typical - 1) * within), (between / within - 1) / error


def _is_new(aligned: Aligned, chosen: Mask) -> Mask:
    """[n] by a hash of the prefix that each chosen token ends."""
    evidence = aligned.evidence
    length = evidence.num_prompt + evidence.num_response
    random = np.random.default_rng(0).integers(1, 2**63, int(evidence.tokens.max(initial=0)) + 1, np.uint64)
    powers = np.cumprod(np.full(int(length.max(initial=1)), 0x9E3779B97F4A7C15, np.uint64))
    sums = np.cumsum(random[evidence.tokens] * powers[within(length)], dtype=np.uint64)
    begin = np.cumsum(length, dtype=np.int64) - length
    before = np.where(begin > 0, sums[begin - 1], np.uint64(0))
    prefix = sums[aligned.token_S[chosen]] - before[aligned.sequence_S[chosen]]
    is_new = np.zeros(len(prefix), bool)
    is_new[np.unique(prefix, return_index=True)[1]] = True
    return is_new


def _flips(ours: Experts | None, theirs: Experts | None, shape: tuple[int, ...]) -> Doubles:
    if ours is None or theirs is None:
        return np.full(shape, np.nan)
    return (np.sort(ours, -1) != np.sort(theirs, -1)).any(-1).astype(np.float64)


def _fresh_sequences(evidence: Evidence) -> Mask:
    """[B] none of whose tokens is known to be of older weights."""
    if evidence.version_gap is None:
        return np.ones(len(evidence.num_response), bool)
    stale = evidence.sequence_of_token[evidence.version_gap != 0]
    return np.bincount(stale, minlength=len(evidence.num_response)) == 0
