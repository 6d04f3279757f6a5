"""Every layout computes what one rank computes: the table behind docs/results.md.

Gradients are gathered to Hugging Face names and compared with one rank's on the same weights, whose largest entry is
about 0.1; sequences have uneven lengths, share microbatches, and four of the six hold tokens of an environment. The
scaling rule proved here is "sum, never average": no gradient depends on data, tensor, pipeline, context or expert ranks,
nor on microbatches, order or padding.
Not covered: CUDA, Transformer Engine.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.trainer.tiny import VESPO, largest_gap, trainer_config

LAYOUTS = [
    {"max_tokens": 32},
    {"tensor": 2, "max_tokens": 64},
    {"pipeline": 2, "max_tokens": 64},
    {"pipeline": 4, "max_tokens": 64},
    {"pipeline": 2, "first_stage_layers": 1, "max_tokens": 64},
    {"pipeline": 2, "virtual_pipeline": 2, "max_tokens": 32},
    {"data": 2, "max_tokens": 32},
    {"data": 2, "expert": 2, "max_tokens": 32},
    {"data": 4, "expert": 4, "max_tokens": 32},
    {"context": 2, "max_tokens": 64},
    {"context": 4, "max_tokens": 64},
    {"tensor": 2, "context": 2},
    {"pipeline": 2, "context": 2, "max_tokens": 64},
    {"context": 2, "data": 2, "expert": 4, "max_tokens": 64},
    {"tensor": 2, "context": 2, "expert": 4, "max_tokens": 64},
    {"tensor": 2, "pipeline": 2, "expert": 2, "max_tokens": 64},
    {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2, "max_tokens": 32},
    {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2, "max_tokens": 32},
    {"tensor": 2, "data": 2, "expert": 2, "max_tokens": 32},
    {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2, "max_tokens": 32},
]


def named(axes):
    return "-".join(f"{name}{size}" for name, size in axes.items() if name != "max_tokens") or "microbatches"


@pytest.fixture(scope="module")
def one_rank(pool, tiny_moe, moderate_batch):
    grid = pool.grid(trainer_config(), tiny_moe, algorithm=VESPO)
    gradients = grid.gradients(moderate_batch)
    assert max(np.abs(g).max() for g in gradients.values()) > 0.05, "the gradients are too small to compare"
    return gradients, grid.step(moderate_batch), grid.weights()


@pytest.mark.parametrize("axes", LAYOUTS, ids=named)
def test_every_layout_gives_the_gradients_and_numbers_of_one_rank(
    pool, tiny_moe, moderate_batch, one_rank, axes
):
    gradients, step, weights = one_rank
    grid = pool.grid(trainer_config(**axes), tiny_moe, algorithm=VESPO)
    assert largest_gap(grid.gradients(moderate_batch[::-1]), gradients) < 1e-6
    got = grid.step(moderate_batch)
    for a, b in zip(got.scored, step.scored, strict=True):
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)
        np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-5)
        np.testing.assert_array_equal(np.sort(a.experts), np.sort(b.experts))
    np.testing.assert_allclose(got.log_w, step.log_w, atol=1e-5)
    np.testing.assert_allclose(got.coefficient, step.coefficient, rtol=1e-4)
    assert got.loss == pytest.approx(step.loss, abs=2e-5)
    assert got.grad_norm == pytest.approx(step.grad_norm, rel=1e-5)
    assert got.updates[0].entropy == pytest.approx(step.updates[0].entropy, abs=1e-5)
    assert largest_gap(grid.weights(), weights) < 1e-6


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("axes", LAYOUTS, ids=named)
def test_recomputation_changes_no_gradient(pool, tiny_moe, moderate_batch, one_rank, axes, recompute):
    cfg = trainer_config(**axes).model_copy(update={"recompute": recompute})
    grid = pool.grid(cfg, tiny_moe, algorithm=VESPO)
    assert largest_gap(grid.gradients(moderate_batch), one_rank[0]) < 1e-6


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "max_tokens": 32},
        {"data": 2, "expert": 2},
        {"tensor": 2, "pipeline": 2, "expert": 2},
        {"context": 2},
        {"data": 4, "expert": 2},
        {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2, "max_tokens": 32},
    ],
    ids=named,
)
@pytest.mark.parametrize("overlap", [False, True])
def test_the_distributed_optimizer_takes_the_same_steps(pool, tiny_moe, moderate_batch, axes, overlap):
    plain = pool.grid(trainer_config(), tiny_moe, algorithm=VESPO)
    expected = [plain.step(moderate_batch, i) for i in range(2)]
    weights = plain.weights()
    cfg = trainer_config(optimizer={"distributed": True, "overlap": overlap}, **axes)
    grid = pool.grid(cfg, tiny_moe, algorithm=VESPO)
    for i in range(2):
        assert grid.step(moderate_batch, i).grad_norm == pytest.approx(expected[i].grad_norm, rel=1e-4)
    assert largest_gap(grid.weights(), weights) < 2e-6


@pytest.mark.parametrize(
    "axes", [{"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"data": 2}], ids=named
)
def test_a_batch_of_fewer_sequences_than_slots_is_filled_with_dummies_that_count_for_nothing(
    pool, tiny_moe, moderate_batch, axes
):
    few = moderate_batch[:1]
    alone = pool.grid(trainer_config(), tiny_moe, algorithm=VESPO).gradients(few)
    grid = pool.grid(trainer_config(**axes), tiny_moe, algorithm=VESPO)
    assert largest_gap(grid.gradients(few), alone) < 1e-6
