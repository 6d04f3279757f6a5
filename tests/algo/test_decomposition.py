from dataclasses import replace

import numpy as np
import pytest

from megatron_vespo.algo.decomposition import (
    Decomposition,
    Passes,
    decompose,
    decompose_natural,
    floor_verdict,
    gap_regression,
    routing_verdict,
)

S = 400
RNG = np.random.default_rng(0)
STALE = np.arange(S) % 3 == 0
GAP = np.where(STALE, 2, 0).astype(np.int32)
M = -RNG.exponential(1, S)
STEP = {name: RNG.normal(0.01, size, S) for name, size in
        (("first", 0.05), ("engine", 0.03), ("routing", 0.1), ("rerun", 0.01), ("update", 0.2))}  # fmt: skip
M2 = M + STEP["first"]
B = M2 + STEP["engine"]
A = B + STEP["routing"]
P = A + STEP["rerun"]
C = P + STEP["update"]
ALL = Passes(behavior=M, engine=M2, replayed=B, natural=A, policy=P, current=C, version_gap=GAP)


def nonzero(parts: Decomposition) -> dict[str, np.ndarray]:
    return {name: part for name, part in parts.parts.items() if part.any()}


def assert_adds_up(found: Decomposition, gap: np.ndarray) -> None:
    np.testing.assert_allclose(found.total, gap, atol=1e-15)
    np.testing.assert_allclose(sum(found.parts.values()), gap, atol=1e-14)


def test_every_pass_has_its_part_and_they_add_up_token_by_token():
    found = decompose(ALL)
    assert_adds_up(found, C - M)
    expected = {
        "staleness": np.where(STALE, STEP["first"], 0),
        "decode": np.where(STALE, 0, STEP["first"]),
        "engine": STEP["engine"],
        "routing": STEP["routing"],
        "rerun": STEP["rerun"],
        "update": STEP["update"],
    }
    assert set(found.parts) == set(expected)
    for name, part in expected.items():
        np.testing.assert_allclose(found.parts[name], part, atol=1e-14)


@pytest.mark.parametrize(
    "missing, expected",
    [
        ({"engine"}, {"unsplit", "engine", "routing", "rerun", "update"}),
        ({"replayed"}, {"staleness", "decode", "engine", "rerun", "update"}),
        ({"natural"}, {"staleness", "decode", "engine", "routing", "update"}),
        ({"current"}, {"staleness", "decode", "engine", "routing", "rerun"}),
        ({"version_gap"}, {"decode", "engine", "routing", "rerun", "update"}),
        ({"engine", "replayed"}, {"unsplit", "engine", "rerun", "update"}),
        ({"engine", "replayed", "natural", "current"}, {"unsplit", "engine"}),
        ({"engine", "replayed", "natural", "current", "version_gap"}, {"engine"}),
    ],
    ids=lambda x: "-".join(sorted(x)),
)
def test_a_pass_that_was_not_made_joins_its_two_differences(missing: set[str], expected: set[str]):
    found = decompose(replace(ALL, **dict.fromkeys(missing)))
    assert set(nonzero(found)) == expected
    assert_adds_up(found, (P if "current" in missing else C) - M)


def test_without_the_engine_only_fresh_tokens_have_an_engine_part():
    found = decompose(replace(ALL, engine=None)).parts
    np.testing.assert_allclose(found["unsplit"], np.where(STALE, B - M, 0), atol=1e-14)
    np.testing.assert_allclose(found["engine"], np.where(STALE, 0, B - M), atol=1e-14)


def test_a_trainer_that_repeats_the_engines_experts_has_no_routing_part():
    replaying = replace(ALL, policy=B + STEP["rerun"], current=None, is_replayed=True)
    found = decompose(replaying)
    assert set(nonzero(found)) == {"staleness", "decode", "engine", "rerun"}
    assert_adds_up(found, B + STEP["rerun"] - M)
    natural = decompose_natural(replaying)
    assert natural is not None
    assert set(nonzero(natural)) == {"staleness", "decode", "engine", "routing"}
    assert_adds_up(natural, A - M)
    assert decompose_natural(replace(replaying, natural=None)) is None


def test_shares_sum_to_one_for_tokens_and_for_sequences():
    found, sequence = decompose(ALL), np.repeat(np.arange(20), 20).astype(np.int32)
    for one in (found, found.by_sequence(sequence, 20)):
        assert sum(one.shares().values()) == pytest.approx(1)
        assert sum(one.square_shares().values()) == pytest.approx(1)
        assert sum(one.means().values()) == pytest.approx(one.total.mean())
    whole = found.by_sequence(sequence, 20)
    np.testing.assert_allclose(whole.total, (C - M).reshape(20, 20).sum(1), atol=1e-12)
    share = np.cov(STEP["routing"], C - M)[0, 1] / np.var(C - M, ddof=1)
    assert found.shares()["routing"] == pytest.approx(share)


def test_a_gap_that_does_not_vary_has_no_shares():
    still = decompose(Passes(behavior=M, policy=M))
    assert still.shares() == still.square_shares() == {} and still.means() == {"unsplit": 0, "engine": 0}
    nothing = decompose(Passes(behavior=M[:0], policy=M[:0]))
    assert nothing.shares() == nothing.square_shares() == nothing.means() == {}


def test_passes_of_other_tokens_and_log_probs_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="same tokens"):
        decompose(replace(ALL, engine=M2[1:]))
    wrong = M2.copy()
    wrong[7] = np.nan
    with pytest.raises(ValueError, match=r"gap\[7\].*nor those of 0 others"):
        decompose(replace(ALL, engine=wrong))
    with pytest.raises(ValueError, match=r"gap\[0\] = 1 nats: its parts \(engine 0.5\)"):
        Decomposition(total=np.ones(1), parts={"engine": np.full(1, 0.5)})


def test_the_routing_verdict_is_one_where_replay_mends_all_and_zero_where_nothing():
    assert routing_verdict(A, M, M) == 1 and routing_verdict(A, A, M) == 0
    # gaps of 0.2 and 0.1: R = 1 - 1/4
    assert routing_verdict(M + 0.2, M + 0.1, M) == pytest.approx(0.75)
    assert routing_verdict(M, M, M) is None


def test_two_equally_noisy_engines_stand_at_the_floor():
    assert floor_verdict(3e-3, 1e-3) == pytest.approx(3) and floor_verdict(1e-3, 0) is None
    first, second, other = RNG.normal(0, 0.05, (3, 100_000))  # noise of A, A2 and M about the same truth
    k3 = [(np.expm1(d) - d).mean() for d in (first - other, first - second)]
    assert floor_verdict(*k3) == pytest.approx(1, abs=0.03)


def test_the_regression_splits_what_the_engine_and_what_a_version_adds():
    gap = np.tile(np.arange(4, dtype=np.int32), 250)
    value = 0.3 + 0.05 * gap + RNG.normal(0, 0.1, 1000)
    found = gap_regression(value, gap)
    (slope, intercept), covariance = np.polyfit(gap, value, 1, cov=True)
    errors = np.sqrt(np.diag(covariance))
    assert found == pytest.approx({
        "intercept": intercept, "slope": slope, "intercept_se": errors[1], "slope_se": errors[0],
    })  # fmt: skip
    assert found["intercept"] == pytest.approx(0.3, abs=4 * found["intercept_se"])
    assert gap_regression(value[:4], np.ones(4, np.int32)) == gap_regression(value[:2], gap[:2]) == {}
