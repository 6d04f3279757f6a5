"""Router divergence in numbers: how two choices of experts for the same tokens differ, where, and at what price.

For one token in one layer P is the choice and Q the reference, both sets of K of E experts: their order means nothing.

    flip            P != Q
    overlap         o = #(P and Q) / K          jaccard = o / (2 - o)          slots = K (1 - o)
    chance          overlap of independent choices with the same loads, sum_e P(e) Q(e) / K: K / E for even loads
    gain, loss      of expert e: tokens that have it in P only, in Q only

Sets are bit words, so that comparing 16,384 tokens x 48 layers x 8 of 128 experts takes a fraction of a second; everything is
made of counts, so that parts of a batch, ranks and steps add up (`RouterGap`, `MarginCurve`).

Shape key:  R rows (processed tokens), L layers, K experts per token, E experts, W words of 64 experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.algo.mismatch import Counts, finite_only
from megatron_vespo.types import Doubles, Experts, Floats, Mask

Bits = NDArray[np.uint64]

_CHUNK = 4096
_MARGIN_EDGES: Doubles = np.concatenate([[0.0], np.exp2(np.arange(-96, 33) / 4)])
"""Of margins in `MarginCurve`, in the router's own unit; the last bin is open."""
NOISE_EDGES: Doubles = np.array([0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, np.inf])
"""Of margins in units of the implied noise E|eps|."""
_FAR = 6 * math.sqrt(math.pi / 2)
"""6 standard deviations of normal noise in units of its E|eps|."""
_NEAR_ZERO = 0.05


def bitsets(experts_RLK: Experts, num_experts: int) -> Bits:
    """[R, L, W] the sets, one bit for each expert; ids outside of [0, num_experts) are in none."""
    words = np.zeros((*experts_RLK.shape[:2], -(-num_experts // 64)), np.uint64)
    if experts_RLK.itemsize > 2:
        is_one = (experts_RLK >= 0) & (experts_RLK < num_experts)
        experts_RLK = np.where(is_one, experts_RLK, 0xFFFF).astype(np.uint16)
    ids_RLK = experts_RLK.view(f"u{experts_RLK.itemsize}")
    bit_of = np.zeros(
        (1 << 8 * ids_RLK.itemsize, words.shape[-1]), np.uint64
    )  # of every id that there can be
    every = np.arange(num_experts)
    bit_of[every, every >> 6] = np.uint64(1) << (every & 63).astype(np.uint64)
    for start in range(0, len(ids_RLK), _CHUNK):
        part = slice(start, start + _CHUNK)
        for place in range(
            ids_RLK.shape[2]
        ):  # a table and whole columns: ten times as fast as arithmetic on ids
            words[part] |= bit_of.take(ids_RLK[part, :, place], axis=0)
    return words


def common(bits_RLW: Bits, reference_RLW: Bits) -> NDArray[np.uint8]:
    """[R, L] how many experts both sets hold; shapes broadcast."""
    counts_RLW = np.bitwise_count(bits_RLW & reference_RLW)
    return sum((counts_RLW[..., word] for word in range(1, counts_RLW.shape[-1])), counts_RLW[..., 0])


def expert_overlap(experts_RLK: Experts, reference_RLK: Experts) -> Doubles:
    """[R, L] share of a token's experts that both engines chose, whatever their order.

    overlap[r, l] = #(P[r, l] and Q[r, l]) / K        chance level: K / number of experts
    """
    if experts_RLK.shape != reference_RLK.shape:
        raise ValueError(
            f"experts have shapes {experts_RLK.shape} and {reference_RLK.shape}: both engines must report the same "
            "tokens, layers and experts per token; check record_experts and the model directory of both"
        )
    num_experts = 1 + int(max(experts_RLK.max(initial=0), reference_RLK.max(initial=0)))
    return (
        common(bitsets(experts_RLK, num_experts), bitsets(reference_RLK, num_experts)) / experts_RLK.shape[-1]
    )


def expert_gap(overlap_RL: Doubles) -> dict[str, float | list[float]]:
    """The few statistics of `expert_overlap` that every step logs.

    overlap_mean       over tokens and layers
    mismatch_fraction  (token, layer) pairs whose expert *sets* differ at all
    any_flip_fraction  tokens with a difference in at least one layer
    overlap_layer      [L] mean over tokens
    """
    flip_RL = overlap_RL < 1.0
    return {
        "overlap_mean": float(overlap_RL.mean()),
        "mismatch_fraction": float(flip_RL.mean()),
        "any_flip_fraction": float(flip_RL.any(-1).mean()),
        "overlap_layer": [float(x) for x in overlap_RL.mean(0)],
    }


@dataclass(frozen=True, kw_only=True)
class RouterGap:
    """Counts over rows: those of two parts add up to those of the whole."""

    common_LC: Counts
    """[L, K + 1] rows by how many experts both sets hold."""
    flips: Counts
    """[L + 1] rows by the number of layers that flip."""
    first_flip: Counts
    """[L + 1] rows by the first layer that flips; the last counts those without a flip."""
    both_flip: Counts
    """[L - 1] rows that flip in layer l and in the next."""
    load_LE: Counts
    """Rows that have the expert in P,"""
    reference_load_LE: Counts
    """in Q,"""
    kept_LE: Counts
    """and in both."""

    @classmethod
    def of(cls, experts_RLK: Experts, reference_RLK: Experts, num_experts: int) -> RouterGap:
        """Of one batch of rows, in chunks, so that memory stays small."""
        num_rows, num_layers, top_k = experts_RLK.shape
        total = cls(
            common_LC=np.zeros((num_layers, top_k + 1), np.int64),
            flips=np.zeros(num_layers + 1, np.int64),
            first_flip=np.zeros(num_layers + 1, np.int64),
            both_flip=np.zeros(max(num_layers - 1, 0), np.int64),
            **{
                name: np.zeros((num_layers, num_experts), np.int64)
                for name in ("load_LE", "reference_load_LE", "kept_LE")
            },
        )
        for start in range(0, num_rows, _CHUNK):
            part = slice(start, start + _CHUNK)
            total += cls._of_chunk(experts_RLK[part], reference_RLK[part], num_experts)
        return total

    @classmethod
    def _of_chunk(cls, experts_RLK: Experts, reference_RLK: Experts, num_experts: int) -> RouterGap:
        num_layers, top_k = experts_RLK.shape[1:]
        reference = bitsets(reference_RLK, num_experts)
        common_RL = common(bitsets(experts_RLK, num_experts), reference)
        flip_RL = common_RL < top_k
        first = np.where(flip_RL.any(-1), flip_RL.argmax(-1), num_layers)
        return cls(
            common_LC=np.stack(
                [np.bincount(common_RL[:, layer], minlength=top_k + 1) for layer in range(num_layers)]
            ),
            flips=np.bincount(flip_RL.sum(-1), minlength=num_layers + 1),
            first_flip=np.bincount(first, minlength=num_layers + 1),
            both_flip=(flip_RL[:, 1:] & flip_RL[:, :-1]).sum(0),
            load_LE=load_counts(experts_RLK, num_experts),
            reference_load_LE=load_counts(reference_RLK, num_experts),
            kept_LE=load_counts(experts_RLK, num_experts, _is_in(experts_RLK, reference)),
        )

    def __add__(self, other: RouterGap) -> RouterGap:
        return RouterGap(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def num_rows(self) -> int:
        return int(self.flips.sum())

    @property
    def top_k(self) -> int:
        return self.common_LC.shape[1] - 1

    @property
    def mismatch_L(self) -> Doubles:
        """Share of rows whose sets differ."""
        return 1 - self.common_LC[:, -1] / max(self.num_rows, 1)

    @property
    def overlap_L(self) -> Doubles:
        return self.common_LC @ np.arange(self.top_k + 1) / (max(self.num_rows, 1) * self.top_k)

    @property
    def bias_LE(self) -> Doubles:
        """(gain - loss) / (gain + loss + kept) of each expert, in [-1, 1]; 0 for one that nobody chose."""
        used = self.load_LE + self.reference_load_LE - self.kept_LE
        return (self.load_LE - self.reference_load_LE) / np.maximum(used, 1)

    def statistics(self) -> dict[str, float]:
        """Of all layers together.

        num_rows  mismatch = share of (row, layer) with a flip  overlap  jaccard  slots_mean (over flips)
        chance    of the overlap               zero_overlap_fraction  of (row, layer)
        any_flip  rows with at least one flip  layers_per_token       mean number n of flips per row
        dispersion   Var(n) / sum_l p_l (1 - p_l): 1 for independent layers, more where flips cascade
        persistence  P(flip at l + 1 | flip at l) / P(flip at l + 1 | none at l), over all l
        load_tv, load_js, directionality, load_max_over_mean, load_cv     means over layers (`layers`), and ..._max the largest
        directionality_chance                                              what swaps without a direction would show
        """
        rows, mismatch = self.num_rows, self.mismatch_L
        if not rows or not self.top_k:
            return {}
        overlap = float(self.overlap_L.mean())
        share = self.common_LC / rows
        count = np.arange(len(self.flips))
        mean_flips = float(self.flips @ count / rows)
        variance = float(self.flips @ np.square(count - mean_flips) / rows)
        independent = float((mismatch * (1 - mismatch)).sum())
        layers = self.layers()
        means = (
            "load_tv",
            "load_js",
            "directionality",
            "directionality_chance",
            "load_max_over_mean",
            "load_cv",
        )
        o = np.arange(self.top_k + 1) / self.top_k
        return finite_only({
            "num_rows": float(rows),
            "mismatch": float(mismatch.mean()),
            "overlap": overlap,
            "jaccard": float((share @ (o / (2 - o))).mean()),
            "chance": float((self.load_LE * self.reference_load_LE).sum(1).mean() / rows**2 / self.top_k),
            "zero_overlap_fraction": float(share[:, 0].mean()),
            "slots_mean": self.top_k * (1 - overlap) / mismatch.mean() if mismatch.any() else None,
            "any_flip": 1 - float(self.flips[0]) / rows,
            "layers_per_token": mean_flips,
            "dispersion": variance / independent if independent else None,
            "persistence": _persistence(self.both_flip.sum(), mismatch * rows, rows),
            **{name: float(np.mean([row[name] for row in layers])) for name in means},
            **{f"{name}_max": max(row[name] for row in layers) for name in means[:3]},
        })  # fmt: skip

    def layers(self) -> list[dict[str, float]]:
        """One row per layer.

        layer  mismatch  overlap  persistence (of the layer before; left out for the first)  first_flip_fraction
        load_tv = sum_e |P_e - Q_e| / 2 and load_js (nats) of the experts' shares of all choices
        slot_disagreement = 1 - overlap, which bounds load_tv
        directionality = load_tv / slot_disagreement: 0 for swaps that cancel, 1 where all go the same way
        directionality_chance    its mean if each flip's direction were a coin toss: few flips never cancel
        load_max_over_mean, reference_load_max_over_mean, load_cv     of P, Q, P
        """
        rows = max(self.num_rows, 1)
        flips_L = self.mismatch_L * rows
        p, q = (
            load / np.maximum(load.sum(1, keepdims=True), 1)
            for load in (self.load_LE, self.reference_load_LE)
        )
        tv = np.abs(p - q).sum(1) / 2
        disagreement = 1 - self.overlap_L
        moved = self.load_LE + self.reference_load_LE - 2 * self.kept_LE
        by_chance = _coin_tosses(moved).sum(1) / 2 / (rows * self.top_k)
        columns = {
            "mismatch": self.mismatch_L,
            "overlap": self.overlap_L,
            "first_flip_fraction": self.first_flip[:-1] / rows,
            "load_tv": tv,
            "load_js": _jensen_shannon(p, q),
            "slot_disagreement": disagreement,
            "directionality": _ratio(tv, disagreement),
            "directionality_chance": _ratio(by_chance, disagreement),
            "load_max_over_mean": p.max(1) * p.shape[1],
            "reference_load_max_over_mean": q.max(1) * q.shape[1],
            "load_cv": p.std(1) * p.shape[1],
        }
        found = [
            {"layer": layer, **{k: float(v[layer]) for k, v in columns.items()}} for layer in range(len(tv))
        ]
        for layer, both in enumerate(self.both_flip, 1):
            ratio = _persistence(both, flips_L[layer - 1 : layer + 1], rows)
            found[layer] |= {} if ratio is None else {"persistence": ratio}
        return found


def cascade(free: RouterGap, local: RouterGap) -> tuple[dict[str, float], list[float | None]]:
    """What of the flips of a free pass was caused by flips in earlier layers.

    Args:
        free: the trainer's choices in a pass of its own against the engine's.
        local: those that it would have made in a pass that uses the engine's, layer by layer, against the engine's.

    Returns:
        free, local        mean mismatch of both
        amplification      free / local
        cascade_share      1 - sum local / sum free
        and amplification by layer, None where nothing flips locally
    """
    total_free, total_local = float(free.mismatch_L.mean()), float(local.mismatch_L.mean())
    found = finite_only({
        "free": total_free,
        "local": total_local,
        "amplification": total_free / total_local if total_local else None,
        "cascade_share": 1 - total_local / total_free if total_free else None,
    })  # fmt: skip
    return found, [
        float(a / b) if b else None for a, b in zip(free.mismatch_L, local.mismatch_L, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class MarginCurve:
    """Choices and flips by the margin delta = s_(K) - s_(K+1) >= 0 of the free pass; those of two parts add up."""

    choices_LM: Counts
    """[L, bins] by margin"""
    flips_LM: Counts

    @classmethod
    def of(cls, margin_RL: Floats, flip_RL: Mask) -> MarginCurve:
        """Margins that are no finite number are left out."""
        num_layers, bins = margin_RL.shape[1], len(_MARGIN_EDGES) - 1
        known = np.isfinite(margin_RL)
        place = np.clip(np.searchsorted(_MARGIN_EDGES, margin_RL, "right") - 1, 0, bins - 1)
        place += np.arange(num_layers) * bins

        def counts(chosen_RL: Mask) -> Counts:
            return np.bincount(place[chosen_RL], minlength=num_layers * bins).reshape(num_layers, bins)

        return cls(choices_LM=counts(known), flips_LM=counts(known & flip_RL))

    def __add__(self, other: MarginCurve) -> MarginCurve:
        return MarginCurve(
            choices_LM=self.choices_LM + other.choices_LM, flips_LM=self.flips_LM + other.flips_LM
        )

    @property
    def f0_L(self) -> Doubles:
        """Density of margins near 0: of the smallest 5 %, up to the next edge; nan for layers without margins."""
        total = self.choices_LM.sum(1)
        reached = np.cumsum(self.choices_LM, 1)
        place = (reached >= _NEAR_ZERO * total[:, None]).argmax(1)
        smaller = np.take_along_axis(reached, place[:, None], 1)[:, 0]
        return np.where(total > 0, smaller / np.maximum(total, 1) / _MARGIN_EDGES[place + 1], np.nan)

    @property
    def noise_L(self) -> Doubles:
        """E|eps| of the difference of two competitors' noise by the margin law, flip rate = f(0) E|eps| / 2."""
        rate = self.flips_LM.sum(1) / np.maximum(self.choices_LM.sum(1), 1)
        return 2 * rate / self.f0_L

    def by_noise(self) -> tuple[Counts, Counts]:
        """Choices and flips of all layers, each by its margin in units of its own implied noise (NOISE_EDGES)."""
        middle = (_MARGIN_EDGES[1:] + _MARGIN_EDGES[:-1]) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            units_LM = middle / self.noise_L[:, None]
        place = np.clip(
            np.searchsorted(NOISE_EDGES, np.nan_to_num(units_LM, nan=0.0), "right") - 1,
            0,
            len(NOISE_EDGES) - 2,
        )
        choices, flips = (
            np.bincount(place.ravel(), counts.ravel(), len(NOISE_EDGES) - 1).astype(np.int64)
            for counts in (self.choices_LM, self.flips_LM)
        )
        return choices, flips

    def statistics(self) -> dict[str, float]:
        """Of all layers.

        margin_p50         of all, up to a factor of 2^(1/8)
        margin_f0          mean of f0_L        implied_noise      mean of noise_L
        far_flip_fraction  flips at margins above 6 standard deviations of normal noise of that size: near 0 for noise
        margin_flatness    flip rate of the largest quarter of the margins over that of the smallest: near 0 for noise, 1 where the
                           choices belong to different tokens, layers or experts
        """
        choices, flips = self.choices_LM.sum(0), self.flips_LM.sum(0)
        if not choices.sum():
            return {}
        reached = np.cumsum(choices) / choices.sum()
        middle = int((reached >= 0.5).argmax())
        far = _MARGIN_EDGES[:-1] > _FAR * self.noise_L[:, None]
        low, high = (
            reached <= max(0.25, reached[choices > 0][0]),
            np.concatenate([[0.0], reached[:-1]]) >= 0.75,
        )
        rates = [flips[part].sum() / max(choices[part].sum(), 1) for part in (low, high)]
        return finite_only({
            "margin_p50": float(np.sqrt(max(_MARGIN_EDGES[middle], 1e-12) * _MARGIN_EDGES[middle + 1])),
            "margin_f0": float(np.nanmean(self.f0_L)),
            "implied_noise": float(np.nanmean(self.noise_L)),
            "far_flip_fraction": float(self.flips_LM[far].sum() / flips.sum()) if flips.any() else None,
            "margin_flatness": float(rates[1] / rates[0]) if rates[0] and choices[high].any() else None,
        })  # fmt: skip


def dose_table(flips_S: Counts, gap_S: Doubles) -> list[dict[str, float]]:
    """Log-prob error of tokens by how many layers flipped in the row that produced them: 0, 1, 2-3, 4-7, 8 and more.

    low, high (flipped layers; high left out where open), num_tokens, abs_mean_nats, k3_nats, f_2, k2_share; empty buckets are
    left out.  What it shows is no cause: uncertain tokens both flip more and differ more.
    """
    total, found = float(np.square(gap_S).sum()), list[dict[str, float]]()
    for low, high in ((0, 0), (1, 1), (2, 3), (4, 7), (8, None)):
        d = gap_S[(flips_S >= low) & (flips_S <= high if high is not None else True)]
        if len(d):
            found.append(
                {"low": low}
                | ({} if high is None else {"high": high})
                | {
                    "num_tokens": len(d),
                    "abs_mean_nats": float(np.abs(d).mean()),
                    "k3_nats": float((np.expm1(d) - d).mean()),
                    "f_2": float((np.abs(d) > math.log(2)).mean()),
                    "k2_share": float(np.square(d).sum() / total) if total else 0.0,
                }
            )
    return found


class Blame(NamedTuple):
    """Of every expert, [L, E]: tokens that used it against those that did not."""

    num: Counts
    used: Doubles
    """Mean d^2 of the tokens that used it,"""
    other: Doubles
    """and of those that did not; nan where there are none."""
    z: Doubles
    """Of the ranks of |d| (Wilcoxon), so that a few extreme tokens blame nobody; 0 where there are none."""

    @property
    def ratio(self) -> Doubles:
        """used / other; nan where one of them is not known or `other` is 0."""
        return np.divide(self.used, self.other, out=np.full_like(self.used, np.nan), where=self.other > 0)


def blame(experts_SLK: Experts, gap_S: Doubles, num_experts: int) -> Blame:
    """Whether the tokens that used one expert in one layer differ more than the others: one wrong expert stands out.

    Args:
        experts_SLK: of the rows that produced the tokens.
    """
    size, square = np.abs(gap_S), np.square(gap_S)
    rank = np.searchsorted(np.sort(size), size, "left") + np.searchsorted(np.sort(size), size, "right")
    score = rank / (2 * max(len(size), 1)) - 0.5  # ties get their mean rank
    num = load_counts(experts_SLK, num_experts)
    square_sum, score_sum = (_weighted_loads(experts_SLK, num_experts, x) for x in (square, score))
    others = len(size) - num
    with np.errstate(divide="ignore", invalid="ignore"):
        used, other = (
            square_sum / num,
            np.where(others > 0, np.maximum(square.sum() - square_sum, 0) / others, np.nan),
        )
        # The sum of `num` ranks drawn without replacement.
        spread = np.sqrt(num * others / max(len(size) - 1, 1) * score.var())
        z = np.where(spread > 0, (score_sum - num * score.mean()) / spread, 0.0)
    return Blame(num, used, other, z)


def selection_loss(
    scores_RLE: Doubles, natural_RLK: Experts, reference_RLK: Experts
) -> Mapping[str, Doubles]:
    """[R, L] what it costs to be given the reference's experts, where the trainer's scores of all experts are at hand.

    mass_lost  share of the gate mass (softmax over the natural choice) on natural experts that the reference lacks
    rank_max   worst place, from 1, of a reference expert by the trainer's scores
    regret     s_(K) - the least score of a reference expert, >= 0
    top1_drop  1 where the best expert by score is not in the reference
    """
    natural = np.take_along_axis(scores_RLE, natural_RLK.astype(np.int64), -1)
    given = np.take_along_axis(scores_RLE, reference_RLK.astype(np.int64), -1)
    gate = np.exp(natural - natural.max(-1, keepdims=True))
    lost = ~(natural_RLK[..., :, None] == reference_RLK[..., None, :]).any(-1)
    worst = given.min(-1)
    return {
        "mass_lost": (gate * lost).sum(-1) / gate.sum(-1),
        "rank_max": (scores_RLE > worst[..., None]).sum(-1) + 1.0,
        "regret": np.maximum(natural.min(-1) - worst, 0.0),
        "top1_drop": (scores_RLE.argmax(-1)[..., None] != reference_RLK).all(-1) * 1.0,
    }


def load_counts(experts_RLK: Experts, num_experts: int, counted_RLK: Mask | None = None) -> Counts:
    """[L, E] rows that hold the expert, where `counted`."""
    valid = (experts_RLK >= 0) & (experts_RLK < num_experts)
    if counted_RLK is not None:
        valid &= counted_RLK
    layer_ids = experts_RLK + np.arange(experts_RLK.shape[1], dtype=np.int64)[:, None] * num_experts
    size = experts_RLK.shape[1] * num_experts
    return np.bincount(layer_ids[valid], minlength=size).reshape(-1, num_experts)


def _weighted_loads(experts_RLK: Experts, num_experts: int, weight_R: Doubles) -> Doubles:
    total = np.zeros((experts_RLK.shape[1], num_experts))
    for layer in range(experts_RLK.shape[1]):
        for slot in range(experts_RLK.shape[2]):
            ids = experts_RLK[:, layer, slot]
            valid = (ids >= 0) & (ids < num_experts)
            total[layer] += np.bincount(ids[valid], weight_R[valid], num_experts)
    return total


def _is_in(experts_RLK: Experts, bits_RLW: Bits) -> Mask:
    """[R, L, K] whether each expert is in the set."""
    ids = np.maximum(experts_RLK, 0).astype(np.int64)
    word = np.take_along_axis(bits_RLW, np.minimum(ids >> 6, bits_RLW.shape[-1] - 1), -1)
    return (word >> (ids & 63).astype(np.uint64) & np.uint64(1)).astype(np.bool_)


def _persistence(both: int, flips_L: Doubles, rows: int) -> float | None:
    """P(flip | flip before) / P(flip | none before), over pairs of neighbouring layers."""
    before, after = float(flips_L[:-1].sum()), float(flips_L[1:].sum())
    none_before = rows * (len(flips_L) - 1) - before
    if not before or none_before <= 0 or after <= both:
        return None
    return float(both / before) / ((after - float(both)) / none_before)


def _jensen_shannon(p_LE: Doubles, q_LE: Doubles) -> Doubles:
    middle = (p_LE + q_LE) / 2

    def relative_entropy(x: Doubles) -> Doubles:
        ratio = np.divide(x, middle, out=np.ones_like(x), where=x > 0)
        return (x * np.log(ratio)).sum(1)

    return (relative_entropy(p_LE) + relative_entropy(q_LE)) / 2


def _coin_tosses(n: Counts) -> Doubles:
    """E|heads - tails| of n tosses: n C(n - 1, (n - 1) // 2) / 2^(n - 1)."""
    table = np.zeros(int(min(n.max(initial=0), 1000)) + 1)
    for tosses in range(1, len(table)):
        table[tosses] = tosses * math.comb(tosses - 1, (tosses - 1) // 2) / 2 ** (tosses - 1)
    return np.where(n < len(table), table[np.minimum(n, len(table) - 1)], np.sqrt(2 * n / math.pi))


def _ratio(a: Doubles, b: Doubles) -> Doubles:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
