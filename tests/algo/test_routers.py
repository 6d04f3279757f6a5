import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import mannwhitneyu

from megatron_vespo.algo.routers import (
    MarginCurve,
    RouterGap,
    bitsets,
    blame,
    cascade,
    dose_table,
    expert_gap,
    expert_overlap,
    selection_loss,
)

R, L, K, E = 60, 4, 3, 70  # 70 experts need two words


def choices(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> np.ndarray:
    return rng.random((*shape[:2], num_experts)).argsort(-1)[..., : shape[2]].astype(np.uint8)


def swapped(experts: np.ndarray, rng: np.random.Generator, rate: float, num_experts: int) -> np.ndarray:
    """The same with one expert of some (row, layer) exchanged for one that is not in the set."""
    other = experts.copy()
    for r, layer in np.argwhere(rng.random(experts.shape[:2]) < rate):
        absent = np.setdiff1d(np.arange(num_experts), other[r, layer])
        other[r, layer, rng.integers(experts.shape[2])] = rng.choice(absent)
    return other[..., rng.permutation(experts.shape[2])]


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = choices(rng, (R, L, K), E)
    return swapped(swapped(reference, rng, 0.3, E), rng, 0.2, E), reference


def test_expert_overlap_ignores_order_and_counts_sets():
    # 2 rows, 2 layers, top-2: (same set, other order) (one of two shared) / (disjoint) (equal)
    chosen = np.array([[[0, 1], [2, 3]], [[0, 1], [4, 5]]], np.int16)
    reference = np.array([[[1, 0], [3, 7]], [[2, 3], [4, 5]]], np.int16)
    overlap = expert_overlap(chosen, reference)
    np.testing.assert_array_equal(overlap, [[1, 0.5], [0, 1]])
    assert expert_gap(overlap) == {
        "overlap_mean": 0.625,
        "mismatch_fraction": 0.5,
        "any_flip_fraction": 1.0,
        "overlap_layer": [0.5, 0.75],
    }


def test_experts_of_different_tokens_are_refused():
    with pytest.raises(ValueError, match="same tokens, layers and experts"):
        expert_overlap(np.zeros((3, 2, 2), np.int16), np.zeros((4, 2, 2), np.int16))


def test_ids_out_of_range_are_in_no_set():
    bits = bitsets(np.array([[[0, 64, 200, -1]]], np.int16), 128)
    assert bits.shape == (1, 1, 2) and bits.tolist() == [[[1, 1]]]


def test_router_statistics_are_those_of_loops_over_sets(pair: tuple[np.ndarray, np.ndarray]):
    p, q = ([[set(map(int, chosen)) for chosen in row] for row in x] for x in pair)
    both = [[len(p[r][layer] & q[r][layer]) for layer in range(L)] for r in range(R)]
    flips = [[n < K for n in row] for row in both]
    per_row = [sum(row) for row in flips]
    rate = [sum(row[layer] for row in flips) / R for layer in range(L)]
    pairs = [(a, b) for row in flips for a, b in pairwise(row)]
    after_flip = [b for a, b in pairs if a]
    after_none = [b for a, b in pairs if not a]
    chance = [
        sum(sum(e in row[layer] for row in p) * sum(e in row[layer] for row in q) for e in range(E))
        / R**2
        / K
        for layer in range(L)
    ]
    everything = [n for row in both for n in row]
    expected = {
        "num_rows": R,
        "mismatch": sum(per_row) / (R * L),
        "overlap": sum(everything) / (R * L * K),
        "jaccard": sum(n / (2 * K - n) for n in everything) / (R * L),
        "chance": sum(chance) / L,
        "zero_overlap_fraction": everything.count(0) / (R * L),
        "slots_mean": sum(K - n for n in everything) / sum(per_row),
        "any_flip": sum(n > 0 for n in per_row) / R,
        "layers_per_token": sum(per_row) / R,
        "dispersion": np.var(per_row) / sum(x * (1 - x) for x in rate),
        "persistence": (sum(after_flip) / len(after_flip)) / (sum(after_none) / len(after_none)),
    }
    found = RouterGap.of(*pair, E).statistics()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_layer_statistics_are_those_of_loops_over_sets(pair: tuple[np.ndarray, np.ndarray]):
    gap = RouterGap.of(*pair, E)
    for layer, row in enumerate(gap.layers()):
        p, q = ([set(map(int, chosen)) for chosen in x[:, layer]] for x in pair)
        load, reference, kept = (
            np.array([sum(e in s for s in sets) for e in range(E)])
            for sets in (p, q, [a & b for a, b in zip(p, q, strict=True)])
        )
        shares = load / (R * K), reference / (R * K)
        tosses = [
            sum(math.comb(n, k) * abs(2 * k - n) for k in range(n + 1)) / 2**n
            for n in load + reference - 2 * kept
        ]
        overlap = kept.sum() / (R * K)
        tv = np.abs(shares[0] - shares[1]).sum() / 2
        expected = {
            "layer": layer,
            "mismatch": sum(a != b for a, b in zip(p, q, strict=True)) / R,
            "overlap": overlap,
            "load_tv": tv,
            "load_js": jensenshannon(*shares) ** 2,
            "slot_disagreement": 1 - overlap,
            "directionality": tv / (1 - overlap),
            "directionality_chance": sum(tosses) / (2 * R * K) / (1 - overlap),
            "load_max_over_mean": load.max() * E / (R * K),
            "load_cv": load.std() / load.mean(),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9)
        used = np.maximum(load + reference - kept, 1)
        np.testing.assert_allclose(gap.bias_LE[layer], (load - reference) / used)
    first = [
        next((layer for layer in range(L) if set(a[layer]) != set(b[layer])), L)
        for a, b in zip(*pair, strict=True)
    ]
    assert [row["first_flip_fraction"] for row in gap.layers()] == [
        first.count(layer) / R for layer in range(L)
    ]


def test_counts_of_parts_add_up(pair: tuple[np.ndarray, np.ndarray]):
    whole, parts = (
        RouterGap.of(*pair, E),
        [RouterGap.of(*(x[part] for x in pair), E) for part in (slice(17), slice(17, None))],
    )
    for name, value in vars(parts[0] + parts[1]).items():
        np.testing.assert_array_equal(value, getattr(whole, name))


def test_the_same_choice_in_another_order_has_no_gap(pair: tuple[np.ndarray, np.ndarray]):
    found = RouterGap.of(pair[0], pair[0][..., ::-1], E).statistics()
    assert (found["mismatch"], found["overlap"], found["load_tv"]) == (0, 1, 0)
    assert "persistence" not in found and "slots_mean" not in found


def test_no_rows_have_no_statistics():
    assert RouterGap.of(np.zeros((0, L, K), np.uint8), np.zeros((0, L, K), np.uint8), E).statistics() == {}


def test_independent_choices_overlap_by_chance():
    rng = np.random.default_rng(1)
    found = RouterGap.of(choices(rng, (2000, 2, 4), 32), choices(rng, (2000, 2, 4), 32), 32).statistics()
    assert found["overlap"] == pytest.approx(4 / 32, abs=0.005) == pytest.approx(found["chance"], abs=0.005)


def test_swaps_with_a_direction_are_told_from_those_without():
    rng = np.random.default_rng(2)
    reference = np.stack([choices(rng, (4000, 1, 1), 15), np.full((4000, 1, 1), 15, np.uint8)], -1)[..., 0, :]
    one_way = reference.copy()
    one_way[:1000, 0, 1] = 16  # expert 15 became 16 in a quarter of the rows
    found = RouterGap.of(one_way, reference, 17).statistics()
    assert found["directionality"] == pytest.approx(1) and found["directionality_chance"] < 0.1
    back = one_way.copy()
    reference[1000:2000, 0, 1] = 16  # and as many the other way
    assert RouterGap.of(back, reference, 17).statistics()["directionality"] == 0


def test_what_earlier_flips_caused_is_the_free_pass_minus_the_local_one():
    reference = np.tile(np.array([0, 1], np.uint8), (8, 2, 1))
    local, free = reference.copy(), reference.copy()
    local[0, :, 1] = 2  # 1 of 8 rows, both layers
    free[0, 0, 1], free[:4, 1, 1] = 2, 2  # layer 1 flips in 4 rows
    gaps = RouterGap.of(free, reference, 4), RouterGap.of(local, reference, 4)
    found, by_layer = cascade(*gaps)
    assert found == {"free": 2.5 / 8, "local": 1 / 8, "amplification": 2.5, "cascade_share": 0.6}
    assert by_layer == [1.0, 4.0]
    assert cascade(gaps[0], RouterGap.of(reference, reference, 4))[1] == [None, None]


def noisy_routers(sigma: float, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Margin of the free pass and flips: scores + normal noise decide, as in the margin law."""
    rng, top_k = np.random.default_rng(seed), 4
    scores = rng.normal(size=(6000, 2, 32))
    natural, noisy = (
        np.argpartition(-x, top_k, -1)[..., :top_k]
        for x in (scores, scores + rng.normal(0, sigma, scores.shape))
    )
    order = -np.sort(-scores, -1)
    return order[..., top_k - 1] - order[..., top_k], expert_overlap(natural, noisy) < 1


def test_flips_imply_the_noise_that_made_them():
    for sigma in (0.005, 0.02):
        margin, flip = noisy_routers(sigma)
        found = MarginCurve.of(margin.astype(np.float32), flip).statistics()
        # The difference of two scores' noise has the standard deviation sqrt(2) sigma, and E|x| = sqrt(2 / pi) of that.
        assert found["implied_noise"] == pytest.approx(2 * sigma / math.sqrt(math.pi), rel=0.2)
        assert found["margin_p50"] == pytest.approx(np.median(margin), rel=0.1)
        assert found["margin_flatness"] < 0.01 and found["far_flip_fraction"] < 0.01


def test_flips_that_do_not_ask_for_the_margin_are_no_noise():
    margin, _ = noisy_routers(0.01)
    flip = np.random.default_rng(4).random(margin.shape) < 0.1
    found = MarginCurve.of(margin.astype(np.float32), flip).statistics()
    assert found["margin_flatness"] == pytest.approx(1, abs=0.2)
    assert MarginCurve.of(np.full((5, 2), np.nan, np.float32), np.ones((5, 2), bool)).statistics() == {}


def test_margin_curves_of_parts_add_up_and_every_choice_is_in_one_bin():
    margin, flip = noisy_routers(0.02)
    margin[:7] = np.nan
    whole = MarginCurve.of(margin.astype(np.float32), flip)
    total = MarginCurve.of(margin[:100].astype(np.float32), flip[:100]) + MarginCurve.of(
        margin[100:].astype(np.float32), flip[100:]
    )
    np.testing.assert_array_equal(total.choices_LM, whole.choices_LM)
    np.testing.assert_array_equal(total.flips_LM, whole.flips_LM)
    num, flips = whole.by_noise()
    assert (num.sum(), flips.sum()) == ((6000 - 7) * 2, flip[7:].sum())
    rate = flips / np.maximum(num, 1)
    assert rate[0] > rate[4] > rate[7]


def test_the_dose_table_by_hand():
    gap = np.array([0.0, 0.1, -1.0, 0.2, 0.0])
    zero, one, many = dose_table(np.array([0, 0, 1, 9, 0]), gap)
    assert (zero["low"], zero["high"], zero["num_tokens"], one["num_tokens"]) == (0, 0, 3, 1)
    assert many["low"] == 8 and "high" not in many
    assert zero["abs_mean_nats"] == pytest.approx(0.1 / 3) and one["f_2"] == 1
    assert [row["k2_share"] for row in (zero, one, many)] == pytest.approx(
        [0.01 / 1.05, 1 / 1.05, 0.04 / 1.05]
    )


def test_error_grows_with_the_dose_where_flips_cause_it():
    rng = np.random.default_rng(5)
    flips = rng.integers(0, 12, 4000)
    rows = dose_table(flips, rng.normal(0, 0.01, 4000) * (1 + flips))
    means = [row["abs_mean_nats"] for row in rows]
    assert means == sorted(means) and len(rows) == 5


def test_a_wrong_expert_is_blamed_and_no_other():
    rng = np.random.default_rng(6)
    experts = choices(rng, (5000, 3, 2), 16)
    gap = rng.normal(0, 0.01, 5000)
    gap[(experts[:, 1] == 11).any(-1)] *= 5
    found = blame(experts, gap, 16)
    assert np.unravel_index(found.z.argmax(), found.z.shape) == (1, 11)
    assert found.ratio[1, 11] == pytest.approx(25, rel=0.25) and found.z[1, 11] > 10
    found.z[1] = 0  # the other experts of that layer are used where 11 is not
    assert np.abs(found.z).max() < 5


def test_blame_is_the_mean_over_users_and_the_rank_sum_of_wilcoxon():
    rng = np.random.default_rng(7)
    experts, gap = choices(rng, (200, 2, 2), 6), rng.normal(size=200)
    found = blame(experts, gap, 6)
    uses = (experts[:, 1] == 4).any(-1)
    assert found.num[1, 4] == uses.sum()
    assert (found.used[1, 4], found.other[1, 4]) == pytest.approx(
        ((gap[uses] ** 2).mean(), (gap[~uses] ** 2).mean())
    )
    test = mannwhitneyu(
        np.abs(gap[uses]),
        np.abs(gap[~uses]),
        use_continuity=False,
        alternative="greater",
        method="asymptotic",
    )
    assert math.erfc(found.z[1, 4] / math.sqrt(2)) / 2 == pytest.approx(test.pvalue, rel=0.02)


def test_blame_of_experts_that_all_or_none_used_is_nothing():
    found = blame(np.zeros((10, 1, 1), np.uint8), np.ones(10), 2)
    assert found.z.tolist() == [[0, 0]] and np.isnan(found.ratio).all()


def test_what_the_reference_costs_by_hand():
    scores = np.log([[[0.4, 0.3, 0.2, 0.1]]])
    found = selection_loss(scores, np.array([[[0, 1]]]), np.array([[[1, 3]]]))
    assert found["mass_lost"][0, 0] == pytest.approx(0.4 / 0.7)
    assert (found["rank_max"][0, 0], found["top1_drop"][0, 0]) == (4, 1)
    assert found["regret"][0, 0] == pytest.approx(np.log(0.3 / 0.1))
