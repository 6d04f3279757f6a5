import numpy as np
import pytest

from megatron_vespo.algo.routers import bitsets
from megatron_vespo.algo.structure import (
    best_shift,
    constant_fraction,
    garbage_spans,
    layer_map,
    mispaired,
    misplaced_layers,
    renamed_experts,
    shift_correlation,
    shift_overlap,
    soundness,
)

B, N, L, K, E = 6, 40, 4, 4, 32
SEQUENCE = np.repeat(np.arange(B, dtype=np.int32), N)
IS_RESPONSE = np.tile(np.arange(N) >= 10, B)
CHANCE = K / E


def top(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, -1)[..., :K].astype(np.uint8)


@pytest.fixture
def healthy() -> tuple[np.ndarray, np.ndarray]:
    """Two engines whose router scores differ by so much noise that some 30 % of the choices flip."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(B * N, L, E))
    return top(scores), top(scores + rng.normal(0, 0.03, scores.shape))


def within(experts: np.ndarray, shift: int) -> np.ndarray:
    """Row r + shift of the same sequence in the place of row r."""
    return np.roll(experts.reshape(B, N, L, K), -shift, 1).reshape(experts.shape)


def bits(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return bitsets(pair[0], E), bitsets(pair[1], E)


def overlap(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    a, b = bits(pair)
    return np.bitwise_count(a & b).sum(-1).mean(1) / K


def test_noise_of_healthy_engines_fails_no_test(healthy: tuple[np.ndarray, np.ndarray]):
    mine, theirs = bits(healthy)
    assert 0.1 < (mine != theirs).any(-1).mean() < 0.5
    shifts = shift_overlap(mine, theirs, SEQUENCE, K)
    assert best_shift(shifts, B * N * L) == 0
    assert misplaced_layers(layer_map(mine, theirs, K)) == (0, 0)
    assert renamed_experts(*healthy, E) == []
    assert garbage_spans(overlap(healthy), SEQUENCE, CHANCE) == []
    assert mispaired(mine, theirs, SEQUENCE, IS_RESPONSE, top_k=K, chance=CHANCE) == []
    for experts in healthy:
        found = soundness(experts, E)
        assert found.pop("sorted_fraction") < 0.2 and not any(found.values())
        assert constant_fraction(experts, SEQUENCE) == 0


def test_another_place_agrees_by_chance(healthy: tuple[np.ndarray, np.ndarray]):
    mine, theirs = bits(healthy)
    shifts = shift_overlap(mine, theirs, SEQUENCE, K)
    np.testing.assert_allclose(np.delete(shifts, 2), CHANCE, atol=0.015)
    mapped = layer_map(mine, theirs, K)
    np.testing.assert_allclose(mapped[~np.eye(L, dtype=bool)], CHANCE, atol=0.03)
    assert np.diag(mapped).min() > 0.8


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_rows_of_another_token_are_found(healthy: tuple[np.ndarray, np.ndarray], shift: int):
    mine, theirs = bits((healthy[0], within(healthy[1], -shift)))
    assert best_shift(shift_overlap(mine, theirs, SEQUENCE, K), B * N * L) == shift


def test_a_shift_never_looks_into_another_sequence():
    one_each = np.arange(3, dtype=np.int32)
    sets = bitsets(np.zeros((3, 1, 1), np.uint8), 2)
    np.testing.assert_array_equal(shift_overlap(sets, sets, one_each, 1), [np.nan, np.nan, 1, np.nan, np.nan])


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_log_probs_of_another_token_are_found(shift: int):
    rng = np.random.default_rng(1)
    logp = -rng.exponential(1, (B, N))
    reference = np.roll(logp + rng.normal(0, 0.05, (B, N)), shift, 1)
    sampled = np.ones(B * N, bool)
    found = shift_correlation(logp.ravel(), reference.ravel(), SEQUENCE, sampled)
    assert best_shift(found, B * N) == shift and found[2 + shift] > 0.95
    assert best_shift(shift_correlation(np.zeros(B * N), np.zeros(B * N), SEQUENCE, sampled), B * N) is None


def test_a_few_tokens_prove_no_shift():
    agreement = np.array([np.nan, 0.2, 0.1, 0.6, np.nan])
    assert best_shift(agreement, 10) == 0 and best_shift(agreement, 1000) == 1


@pytest.mark.parametrize("offset", [-1, 1, 2])
def test_rows_of_another_layer_are_found(healthy: tuple[np.ndarray, np.ndarray], offset: int):
    mapped = layer_map(*bits((healthy[0], np.roll(healthy[1], offset, 1))), K)
    share, found = misplaced_layers(mapped)
    assert share == 1 and found in (offset, offset - L, offset + L)


def test_renamed_experts_are_found_in_their_layer_and_only_there(healthy: tuple[np.ndarray, np.ndarray]):
    mine, theirs = healthy
    names = np.arange(E, dtype=np.uint8)
    names[[3, 17, 20]] = names[[17, 20, 3]]
    renamed = theirs.copy()
    renamed[:, 2] = names[theirs[:, 2]]
    found = renamed_experts(mine, renamed, E)
    assert [(x.layer, x.expert, x.found_as) for x in found] == [(2, 3, 17), (2, 17, 20), (2, 20, 3)]
    assert all(x.overlap < 0.4 < 0.7 < x.found_overlap for x in found)


def test_a_span_of_foreign_rows_is_found_where_it_is(healthy: tuple[np.ndarray, np.ndarray]):
    mine, theirs = healthy[0], healthy[1].copy()
    at = slice(2 * N + 12, 2 * N + 30)
    theirs[at] = top(np.random.default_rng(2).normal(size=(18, L, E)))
    (span,) = garbage_spans(overlap((mine, theirs)), SEQUENCE, CHANCE)
    assert span.sequence == 2 and abs(span.start - 12) <= 4 and abs(span.start + span.length - 30) <= 4
    assert span.overlap < 0.4


def test_a_sequence_shorter_than_a_window_is_one():
    (span,) = garbage_spans(np.array([1, 1, 0.1, 0.1, 0.1]), np.array([0, 0, 7, 7, 7]), 0.1)
    assert (span.sequence, span.start, span.length) == (7, 0, 3)


def test_exchanged_sequences_are_found_and_say_whose_rows_they_hold(healthy: tuple[np.ndarray, np.ndarray]):
    rows = healthy[1].reshape(B, N, L, K).copy()
    rows[[1, 4]] = rows[[4, 1]]
    rows[:, :10] = healthy[1].reshape(B, N, L, K)[:, :10]  # the prompts are their own
    mine, theirs = bits((healthy[0], rows.reshape(B * N, L, K)))
    found = mispaired(mine, theirs, SEQUENCE, IS_RESPONSE, top_k=K, chance=CHANCE)
    assert [(x.sequence, x.found_in) for x in found] == [(1, 4), (4, 1)]
    assert all(x.overlap < 0.2 and x.found_overlap > 0.8 for x in found)


def test_a_sequence_whose_rows_are_nowhere_is_not_called_exchanged(healthy: tuple[np.ndarray, np.ndarray]):
    theirs = healthy[1].copy()
    theirs[SEQUENCE == 3] = top(np.random.default_rng(3).normal(size=(N, L, E)))
    assert mispaired(*bits((healthy[0], theirs)), SEQUENCE, IS_RESPONSE, top_k=K, chance=CHANCE) == []


def test_ids_that_are_no_sets_of_experts_are_counted():
    rows = np.tile(np.array([5, 1, 2, 3], np.int16), (10, 2, 1))
    rows[0] = 0  # never written
    rows[1, 0] = [4, 4, 1, 2]
    rows[2, 1] = -1
    rows[3, 0, 0] = 40
    rows[4, 1] = [1, 2, 3, 5]
    assert soundness(rows, E) == pytest.approx({
        "out_of_range_fraction": 1 / 80,
        "sentinel_fraction": 4 / 80,
        "duplicate_fraction": 1 / 20,
        "zero_row_fraction": 1 / 10,
        "zero_layers": 0,
        "sorted_fraction": 4 / 20,
    })  # fmt: skip
    rows[:, 1] = 0
    assert soundness(rows, E)["zero_layers"] == 1
    assert soundness(np.zeros((0, 2, 4), np.uint8), E) == {}


def test_the_order_of_unsigned_ids_is_seen():
    descending = np.tile(np.array([9, 5, 2], np.uint8), (4, 2, 1))
    assert soundness(descending, E)["sorted_fraction"] == 0
    assert soundness(descending[..., ::-1], E)["sorted_fraction"] == 1


def test_rows_that_stand_still_are_found_unless_they_do_so_in_both(healthy: tuple[np.ndarray, np.ndarray]):
    stuck = healthy[1].copy()
    stuck[N + 5 : N + 25] = stuck[N + 5]
    stuck[3 * N : 3 * N + 4] = stuck[3 * N]  # too few to tell
    assert constant_fraction(stuck, SEQUENCE) == pytest.approx(19 / (B * N))
    assert constant_fraction(stuck, SEQUENCE, healthy[0]) == pytest.approx(19 / (B * N))
    assert constant_fraction(stuck, SEQUENCE, stuck) == 0
