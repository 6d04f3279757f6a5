"""Which failure explains the numbers: every known one is a rule that looks for the signs that only it leaves.

Rules are tests against the run's own scatter: errors are taken over sequences, because the tokens of one hang together,
and nothing is called a failure that is not both significant and large.  Order matters.  A record that is shifted or
belongs to another sequence makes everything that follows meaningless; what the engine calls a log-prob comes next;
only then may weights be blamed; and what every healthy run has is an explanation only when nothing else is.
docs/doctor.md says which signs tell which causes apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_vespo.algo.mismatch import bf16_fraction
from megatron_vespo.algo.norms import NORMS
from megatron_vespo.diagnose.examination import Examination, Row
from megatron_vespo.diagnose.signs import (
    Rows,
    Tokens,
    clustered_mean,
    mean_square,
    rows_of,
    share_by_token,
    tokens_of,
)
from megatron_vespo.evidence import Evidence
from megatron_vespo.types import Doubles, Experts, Ints, Mask

Kind = Literal["record", "semantics", "weights", "benign"]
Z = 5.0
"""Standard errors that make a difference significant, with room for the many comparisons of one diagnosis."""
_SYSTEMATIC = 0.25
"""Share of a gap that is a function of the token alone: of rounding next to nothing, of other weights a third and more."""
_SEQUENCES = 16
"""Whose tokens must use an expert, and whose must not, before it can be blamed."""
_BLAME = math.log(3)
"""Log ratio of squared gaps that makes an expert suspicious; chance and token types stay below two."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One explanation."""

    name: str
    """A key of CAUSES."""
    strength: float
    """In (0, 1]: the share of what is wrong that it explains."""
    text: str
    """What is wrong, with the numbers that say so."""
    next_step: str

    @property
    def kind(self) -> Kind:
        return CAUSES[self.name].kind

    @property
    def is_failure(self) -> bool:
        """Something is to be mended; false for what every healthy run has more or less of."""
        return self.kind != "benign"


@dataclass(frozen=True)
class Known:
    """What a cause is, whatever the run."""

    kind: Kind
    title: str
    next_step: str


CAUSES: Mapping[str, Known] = {
    "logp_shift": Known("record", "log-probs stand at the wrong token",
        "look where the engine's log-probs are cut and joined: the first response token's log-prob comes from the prompt's last row"),
    "row_shift": Known("record", "expert rows stand at the wrong token",
        "row p belongs to the processing of token p; look at routed_experts_start_len and where prompt and response rows are spliced"),
    "layer_offset": Known("record", "expert rows belong to another layer",
        "look how layers are counted: leading dense layers, the offset of pipeline stages, virtual stages"),
    "expert_ids": Known("record", "the two engines number experts differently",
        "return logical expert ids (before the balancing of expert parallelism), and look at the order of experts in the weight push"),
    "other_sample": Known("record", "expert rows belong to another sequence",
        "look at the order of the batch between engine and trainer; carry the routes with the sequence, not beside it"),
    "missing_rows": Known("record", "expert rows were never written",
        "look at capture on all pipeline stages, prefix-cache reload and the last prompt row; replay must fall back for these rows"),
    "coarse_logp": Known("semantics", "log-probs were rounded to bfloat16",
        "compute the log-softmax in float32: SGLang --enable-fp32-lm-head, and do not cast log-probs in transport"),
    "temperature": Known("semantics", "log-probs are of another temperature",
        "divide logits by the sampling temperature on both sides, or ask the engine for log-probs of the processed logits"),
    "top_p": Known("semantics", "sampling was truncated, which the log-probs do not say",
        "sample with top_p = 1 and top_k = -1, or return the sampling mask and apply it in the trainer"),
    "noise": Known("semantics", "log-probs carry noise that no model makes",
        "certain tokens must agree exactly: look at the transport and quantisation of log-probs, and at kernels that are not deterministic"),
    "prompt_tokens": Known("weights", "the engine read other tokens in the prompt",
        "send token ids, not text; compare the chat templates, the tokenizer versions and added special tokens"),
    "stale_cache": Known("weights", "keys and values in the engine's cache are of older weights",
        "flush the engine's cache at every weight push (SGLang: flush_cache), or do not resume requests across it"),
    "wrong_expert": Known("weights", "the weights of single experts are wrong",
        "compare these experts' weights on both sides; look at names, slices and the order in which experts are gathered in the weight push"),
    "old_weights": Known("weights", "the engine computes with other weights than the trainer",
        "look whether the last push was confirmed by the engine's own version and digest; push again and watch the canary"),
    "staleness": Known("benign", "data is older than the weights that it trains",
        "lower loop.max_staleness or the learning rate where phi falls; nothing is broken"),
    "routing": Known("benign", "the engines choose different experts",
        "repeat the engine's choice in the trainer: trainer.router_replay = \"engine\" (R3)"),
    "trainer_noise": Known("benign", "the trainer differs as much from itself",
        "the engine is not the limit; ask for deterministic kernels in the trainer first"),
    "engine_noise": Known("benign", "the engines' arithmetic differs",
        "float32 lm head, the same attention kernels, a float32 router, batch-invariant kernels: in this order"),
}  # fmt: skip
"""Every cause that can be named."""


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What a rule sees."""

    evidence: Evidence
    examination: Examination
    tokens: Tokens
    rows: Rows

    def metric(self, name: str) -> float:
        """nan where it could not be computed."""
        return self.examination.metrics.get(name, math.nan)

    def failed(self, *tests: str) -> list[Row]:
        """The structure tests of these names that failed."""
        rows = self.examination.tables.get("structure", [])
        return [row for row in rows if row["test"] in tests and not row["passed"]]


_Rule = Callable[[_Case], Cause | None]


def diagnose(evidence: Evidence, examination: Examination) -> list[Cause]:
    """The causes that explain the examination, the most basic first; none for healthy evidence."""
    case = _Case(
        evidence=evidence, examination=examination, tokens=tokens_of(evidence), rows=rows_of(evidence)
    )
    if shift := _logp_shift(case):
        return [shift]
    record = sorted(_found(case, _RECORD), key=lambda cause: -cause.strength)[:1]
    explanation = (_found(case, _SEMANTICS) or _found(case, _WEIGHTS))[:1]
    return record + explanation or sorted(_found(case, _BENIGN), key=lambda cause: -cause.strength)


def _found(case: _Case, rules: tuple[_Rule, ...]) -> list[Cause]:
    return [cause for rule in rules if (cause := rule(case)) is not None]


def _cause(name: str, strength: float, text: str, hint: str = "") -> Cause:
    known = CAUSES[name]
    return Cause(
        name=name,
        strength=float(min(1.0, max(0.01, strength))),
        text=f"{known.title}: {text}",
        next_step=known.next_step + (f"; {hint}" if hint else ""),
    )


# The record: rows and log-probs that belong elsewhere


def _logp_shift(case: _Case) -> Cause | None:
    shift = case.metric("structure/logp_shift")
    if not shift or math.isnan(shift):
        return None
    fit = case.examination.arrays["structure/logp_shift"]
    best, unshifted = float(fit[int(shift) + 2]), float(fit[2])
    return _cause(
        "logp_shift",
        best,
        f"shifted by {shift:+.0f} the engine's log-probs fit the trainer's (correlation {best:.3f}), as recorded they do not "
        f"({unshifted:.3f}); all other numbers mean nothing until this is mended",
    )


def _row_shift(case: _Case) -> Cause | None:
    shift = case.metric("structure/token_shift")
    if not shift or math.isnan(shift):
        return None
    fit = case.examination.arrays["structure/token_shift"]
    best, unshifted = float(fit[int(shift) + 2]), float(fit[2])
    return _cause(
        "row_shift",
        best,
        f"shifted by {shift:+.0f} rows {best:.1%} of the experts agree, as recorded {unshifted:.1%}",
        "shift -1 or +1: the splice of prompt and response is off by one",
    )


def _layer_offset(case: _Case) -> Cause | None:
    offset = case.metric("structure/layer_offset")
    if not offset or math.isnan(offset):
        return None
    overlap = case.examination.arrays["structure/layer_shift"]
    moved, own = float(np.diagonal(overlap, int(offset)).mean()), float(np.diagonal(overlap).mean())
    return _cause(
        "layer_offset",
        moved,
        f"layer l of one engine agrees with layer l{offset:+.0f} of the other ({moved:.1%} of the experts), with its own in {own:.1%}",
    )


def _expert_ids(case: _Case) -> Cause | None:
    rows = case.examination.tables.get("permutation", [])
    if not case.metric("structure/permuted_experts") > 0 or not rows:
        return None
    some = "; ".join(
        f"layer {row['layer']}: {row['expert']} is called {row['found_as']} ({row['found_overlap']:.0%} agree so, "
        f"{row['overlap']:.0%} as recorded)"
        for row in rows[:3]
    )
    return _cause(
        "expert_ids",
        float(np.mean([row["found_overlap"] for row in rows])),
        f"{len(rows)} experts bear another number: {some}",
    )


def _other_sample(case: _Case) -> Cause | None:
    num = case.metric("structure/mispaired_sequences")
    if not num > 0:
        return None
    of = case.metric("data/num_routed_sequences")
    some = "; ".join(row["detail"] for row in case.failed("mispaired_sequences"))
    return _cause(
        "other_sample",
        num / of,
        f"the expert rows of {num:.0f} of {of:.0f} sequences fit another sequence better than their own ({some})",
    )


def _missing_rows(case: _Case) -> Cause | None:
    kinds = {
        "zero_row_fraction": "all zero", "sentinel_fraction": "marked as missing", "out_of_range_fraction": "out of range",
        "duplicate_fraction": "with an expert twice", "constant_row_fraction": "the same in all layers",
    }  # fmt: skip
    shares = {words: case.metric(f"structure/{key}") for key, words in kinds.items()}
    by_chance = {kinds["constant_row_fraction"]: 0.01}  # of few layers and experts
    found = {words: share for words, share in shares.items() if share > by_chance.get(words, 0)}
    if not found:
        return None
    text = ", ".join(f"{share:.1%} {words}" for words, share in found.items())
    return _cause("missing_rows", max(found.values()), f"of the rows {text}")


# What the engine calls a log-prob


def _coarse_logp(case: _Case) -> Cause | None:
    columns = {
        "engine, when it sampled": case.evidence.behavior_logp,
        "engine, prefill": case.evidence.engine_logp,
    }
    shares = {who: _bfloat16_share(logp) for who, logp in columns.items() if logp is not None}
    who = max(shares, key=lambda name: shares[name])
    if shares[who] < 0.99:
        return None
    rounding = float(np.nanmean(np.abs(case.evidence.behavior_logp))) * 2**-9
    return _cause(
        "coarse_logp",
        shares[who],
        f"{shares[who]:.1%} of the log-probs ({who}) are bfloat16 numbers, which by chance one of 65,536 is; rounding alone "
        f"is worth up to {rounding:.1e} nats a token on average",
    )


def _bfloat16_share(logp: np.ndarray) -> float:
    """Of values other than 0 whose float32 has no bit that bfloat16 lacks; 0 for too few to tell."""
    values = logp[np.isfinite(logp) & (logp != 0)]
    return (bf16_fraction(values) or 0.0) if len(values) >= 50 else 0.0


def _temperature(case: _Case) -> Cause | None:
    """Logits times b change log p(y) by (b - 1)(log p(y) + entropy), to first order; weights do not know of entropy."""
    tokens = case.tokens
    x, gap = tokens.trainer + tokens.entropy, tokens.gap
    known = np.isfinite(x) & np.isfinite(gap)
    if known.sum() < 200:
        return _temperature_by_slope(case)
    slope, error, explained = _line(x[known], gap[known], tokens.sequence[known])
    if abs(slope) < max(0.01, Z * error) or explained < 0.5:
        return None
    ratio = 1 / (1 - slope)
    return _cause(
        "temperature",
        explained,
        f"the engine's temperature is {ratio:.3f} times the trainer's (+- {2 * error:.3f}); this explains {explained:.0%} of "
        "the squared gap",
    )


def _temperature_by_slope(case: _Case) -> Cause | None:
    """Without entropies: a straight line that is not the diagonal."""
    behavior, gap = case.tokens.behavior, case.tokens.gap
    known = np.isfinite(behavior) & np.isfinite(gap)
    if known.sum() < 200:
        return None
    slope, error, explained = _line(behavior[known], gap[known], case.tokens.sequence[known])
    if abs(slope) < max(0.02, Z * error) or explained < 0.6:
        return None
    return _cause(
        "temperature",
        explained,
        f"the trainer's log-probs are {1 + slope:.3f} times the engine's (+- {2 * error:.3f}), which explains {explained:.0%} "
        "of how the gap varies; entropies are not recorded, so that truncation is not excluded",
    )


def _top_p(case: _Case) -> Cause | None:
    return _renormalised(case) or _unsaid(case)


def _renormalised(case: _Case) -> Cause | None:
    """Log-probs of what is left after truncation are too large, all of them; then the trainer's probabilities do not sum to 1."""
    gap = case.tokens.gap[np.isfinite(case.tokens.gap)]
    ratio, error = clustered_mean(np.exp(np.minimum(case.tokens.gap, 20.0)), case.tokens.sequence)
    missing = 1 - ratio
    if not missing > max(Z * error, 0.002) or -gap.mean() < 3 * np.square(gap).mean() / 2:
        return None
    one_sided = float(np.square(gap[gap < 0]).sum() / np.square(gap).sum())
    return _cause(
        "top_p",
        one_sided,
        f"the engine's log-probs are larger than the trainer's, by {-gap.mean():.3f} nats on average and hardly ever by more "
        f"than {-np.quantile(gap, 0.005):.3f} (top_p = {math.exp(np.quantile(gap, 0.005)):.2f}); the mean ratio is {ratio:.4f} "
        f"+- {2 * error:.4f} and should be 1",
    )


def _unsaid(case: _Case) -> Cause | None:
    """Tokens drawn from exp(M) are, weighted by exp(A - M), as likely under A as its entropy says: an exact mean of zero."""
    tokens = case.tokens
    excess = np.exp(np.minimum(tokens.gap, 5.0)) * (tokens.trainer + tokens.entropy)
    mean, error = clustered_mean(excess, tokens.sequence)
    if not abs(mean) > max(Z * error, 0.02):
        return None
    if mean > 0:
        return _cause(
            "top_p",
            1 - Z * error / mean,
            f"sampled tokens are {mean:.3f} +- {2 * error:.3f} nats likelier than the log-probs say they should be on average, "
            "as under top-p, top-k or a lower temperature",
        )
    return _cause(
        "temperature",
        1 + Z * error / mean,
        f"sampled tokens are {-mean:.3f} +- {2 * error:.3f} nats less likely than the log-probs say they should be on average, "
        "as when sampling at a higher temperature than that of the log-probs",
    )


def _noise(case: _Case) -> Cause | None:
    """Whatever changes a model moves a log-prob by about (1 - p); noise on the number does not know of p."""
    tokens = case.tokens
    gap = tokens.gap
    x = np.log(1 + 1e-6 - np.exp(tokens.trainer))
    y = np.log(np.abs(gap) + 1e-6)
    known = np.isfinite(y)
    floor = mean_square(tokens.trainer - tokens.repeat)
    if known.sum() < 200 or not mean_square(gap) > max(1e-4, 0.0 if math.isnan(floor) else 10 * floor):
        return None
    slope, error, _ = _line(x[known], y[known], tokens.sequence[known])
    if slope + 3 * error > 0.5:
        return None
    certain = tokens.trainer > math.log(0.9)
    return _cause(
        "noise",
        1 - max(0.0, slope),
        f"the gap grows as (1 - p) to the power {slope:.2f} +- {2 * error:.2f}, where a model's would grow with power 1; its root "
        f"mean square is {math.sqrt(mean_square(gap)):.3f} nats over all tokens and {math.sqrt(mean_square(gap[certain])):.3f} "
        f"over the {certain.sum()} with p > 0.9",
    )


def _line(x: Doubles, y: Doubles, cluster: Ints) -> tuple[float, float, float]:
    """Slope of y on x, its standard error clustered by sequence, and the share of y's variance that the line explains."""
    x, y = x - x.mean(), y - y.mean()
    square = max(float(np.square(x).sum()), 1e-30)
    slope = float((x * y).sum()) / square
    rest = y - slope * x
    error = math.sqrt(float(np.square(np.bincount(cluster, weights=x * rest)).sum())) / square
    return slope, error, 1 - float(np.square(rest).sum() / max(float(np.square(y).sum()), 1e-30))


# Other weights, or another context


def _other_context(case: _Case) -> Cause | None:
    """The engine's prefill agrees with the trainer, what it said when sampling does not: weights are right, the context was not."""
    tokens = case.tokens
    share, significance = share_by_token(tokens.phase, tokens)
    inside, between = mean_square(tokens.phase), mean_square(tokens.rescored_gap)
    if share < _SYSTEMATIC or significance < Z or not inside > 2 * between:
        return None
    text = (
        f"the engine's prefill agrees with the trainer (root mean square {math.sqrt(between):.1e} nats), what the engine said when "
        f"it sampled with neither ({math.sqrt(inside):.1e}, {share:.0%} of it a function of the token alone)"
    )
    if template := _prompt_token(case):
        return _cause("prompt_tokens", share, f"{template}; {text}")
    rows = case.rows
    prompt, response = (_flip_rate(rows, side) for side in (rows.from_end >= 0, rows.from_end < 0))
    if case.evidence.version_gap is None and not prompt > response:
        return _cause(
            "staleness",
            share,
            f"{text}; versions are not recorded, so that older weights are likelier than a stale cache",
        )
    if not math.isnan(prompt):
        usual = _flip_rate(rows, rows.from_end >= 0, rows.engine_flips)
        text += (
            f"; of the experts of prompt rows {prompt:.1%} differ when sampling, {usual:.1%} in the prefill"
        )
    return _cause("stale_cache", share, text)


def _flip_rate(rows: Rows, chosen: Mask, flips: Doubles | None = None) -> float:
    """Share of (row, layer) in which the choice differs; nan where nothing is known."""
    some = (rows.flips if flips is None else flips)[chosen & rows.is_fresh]
    return float(np.nanmean(some)) if np.isfinite(some).any() else math.nan


def _prompt_token(case: _Case) -> str | None:
    """Up to one place of every prompt the routes agree, and there they differ in every sequence."""
    rows = case.rows
    prompt = rows.is_fresh & (rows.from_end >= 0) & np.isfinite(rows.flips).all(-1)
    if rows.flips.shape[1] == 0 or not prompt.any():
        return None
    share, num = rows.flips[prompt].mean(-1), len(np.unique(rows.sequence[prompt]))
    for place, words in (
        (rows.position[prompt], "token {} of the prompt"),
        (-rows.from_end[prompt], "the prompt's last token {}"),
    ):
        for here in np.unique(place):
            at, before = share[place == here], share[place < here]
            if len(at) < 0.9 * num or (at > 0).mean() < 0.9 or at.mean() < 0.5:
                continue
            if before.size and before.mean() < at.mean() / 3:
                where = words.format(f"{here:+d}" if here < 0 else here)
                return f"before {where} {before.mean():.1%} of the layers choose other experts, there {at.mean():.0%}, in every sequence"
            break
    return None


def _other_weights(case: _Case) -> Cause | None:
    """The engine agrees with itself but not with the trainer."""
    tokens = case.tokens
    gap = tokens.gap if np.isnan(tokens.engine).all() else tokens.rescored_gap
    floor = max(
        (x for x in (mean_square(tokens.phase), mean_square(tokens.trainer - tokens.repeat)) if x == x),
        default=0.0,
    )
    if not mean_square(gap) > 2 * floor:
        return None
    if blamed := _one_expert(case, gap):
        return blamed
    share, significance = share_by_token(gap, tokens)
    if share < _SYSTEMATIC or significance < Z or mean_square(gap) / 2 < _healthy_k3(case):
        return None
    if template := _prompt_token(case):
        return _cause("prompt_tokens", share, f"{template}; the engine's prefill reads them as well")
    return _cause(
        "old_weights",
        share,
        f"the gap is {math.sqrt(mean_square(gap)):.1e} nats (root mean square), {share:.0%} of it a function of the token alone "
        f"(rounding: none); the engine differs from itself by {math.sqrt(floor):.1e}",
    )


def _one_expert(case: _Case, gap: Doubles) -> Cause | None:
    """Tokens of one expert err by far more than others, and no other expert comes near."""
    tokens, trainer = case.tokens, case.rows.trainer
    known = np.isfinite(gap) & (tokens.row >= 0)
    if trainer is None or known.sum() < 200:
        return None
    experts = trainer[tokens.row[known]]
    x = np.log(1.02 - np.exp(tokens.trainer[known]))
    y = np.log(np.square(gap[known]) + 1e-4 * mean_square(gap))
    y = y - _line(x, y, tokens.sequence[known])[0] * x
    first = _worst_expert(experts, y, tokens.sequence[known])
    if first is None or first.effect < _BLAME or first.significance < Z:
        return None
    layer, expert = first.layer, first.expert
    others = ~(experts[:, layer] == expert).any(-1)
    second = _worst_expert(experts[others], y[others], tokens.sequence[known][others], layer=layer)
    text = f"tokens that use expert {expert} of layer {layer} have {math.exp(first.effect):.1f} times the squared gap of others"
    text += f" ({first.significance:.0f} standard errors)"
    strength = _explained(experts[:, layer] == expert, np.square(gap[known]))
    if strength < 0.1:
        return None
    if second and second.effect > max(_BLAME, first.effect / 2) and second.significance > Z:
        text += f", without it those of expert {second.expert} {math.exp(second.effect):.1f} times: the two may be swapped"
        both = (experts[:, layer] == expert) | (experts[:, layer] == second.expert)
        strength = _explained(both, np.square(gap[known]))
    return _cause("wrong_expert", strength, text)


@dataclass(frozen=True)
class _Blame:
    layer: int
    expert: int
    effect: float
    """Mean log squared gap of its tokens minus that of others."""
    significance: float


def _worst_expert(experts: Experts, y: Doubles, sequence: Ints, layer: int | None = None) -> _Blame | None:
    """The expert whose tokens have the most significantly greater y."""
    found = []
    for level in range(experts.shape[1]) if layer is None else (layer,):
        for expert in np.unique(experts[:, level]):
            uses = (experts[:, level] == expert).any(-1)
            if min(len(np.unique(sequence[uses])), len(np.unique(sequence[~uses]))) < _SEQUENCES:
                continue
            ours, theirs = y[uses].mean(), y[~uses].mean()
            rest = (uses - uses.mean()) * (y - np.where(uses, ours, theirs))
            spread = len(y) * uses.mean() * (1 - uses.mean())
            error = math.sqrt(float(np.square(np.bincount(sequence, weights=rest)).sum())) / spread
            found.append(
                _Blame(level, int(expert), float(ours - theirs), float((ours - theirs) / max(error, 1e-12)))
            )
    large = [blame for blame in found if blame.effect > _BLAME]
    return max(large or found, key=lambda blame: blame.significance, default=None)


def _explained(uses: Mask, square: Doubles) -> float:
    """Share of the squared gap above what tokens of other experts have."""
    ours = uses.any(-1)
    return float(1 - square[~ours].mean() / square.mean())


def _healthy_k3(case: _Case) -> float:
    """k3 that needs no explanation, nats."""
    facts = case.evidence.facts
    is_float32 = facts.trainer_dtype == facts.engine_dtype == "float32"
    condition = "float32" if is_float32 else "moe" if case.rows.flips.shape[1] else "dense"
    return NORMS["mismatch/k3_nats"].limits(condition)[0]


# What healthy runs have more or less of


def _staleness(case: _Case) -> Cause | None:
    share, k3 = case.metric("cause/staleness_square_share"), case.metric("total/k3_nats")
    if not (share > 0.5 and k3 > _healthy_k3(case)):
        return None
    gap = case.metric("data/version_gap_mean")
    return _cause("staleness", share, f"{share:.0%} of the squared gap, at {gap:.1f} versions on average")


def _routing(case: _Case) -> Cause | None:
    share = case.metric("cause/routing_r")
    if not (share > 0.5 and _is_raised(case)):
        return None
    return _cause(
        "routing", share, f"with the engine's experts {share:.0%} of the squared engine mismatch is gone"
    )


def _trainer_noise(case: _Case) -> Cause | None:
    z = case.metric("cause/floor_z")
    if not (z < 2.5 and _is_raised(case)):
        return None
    return _cause(
        "trainer_noise",
        1 / max(z, 1.0),
        f"k3 between the engines is {z:.1f} times that of the trainer with itself",
    )


def _engine_noise(case: _Case) -> Cause | None:
    if not _is_raised(case):
        return None
    k3 = case.metric("mismatch/k3_nats")
    return _cause(
        "engine_noise",
        0.2,
        f"k3 {k3:.1e} nats, normal is below {_healthy_k3(case):.0e}, and no failure shows its signs",
    )


def _is_raised(case: _Case) -> bool:
    return case.metric("mismatch/k3_nats") > _healthy_k3(case)


_RECORD: tuple[_Rule, ...] = (
    _logp_shift,
    _row_shift,
    _layer_offset,
    _expert_ids,
    _other_sample,
    _missing_rows,
)
_SEMANTICS: tuple[_Rule, ...] = (_coarse_logp, _temperature, _top_p, _noise)
_WEIGHTS: tuple[_Rule, ...] = (_other_context, _other_weights)
_BENIGN: tuple[_Rule, ...] = (_staleness, _routing, _trainer_noise, _engine_noise)
