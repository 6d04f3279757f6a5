"""Every algorithm on real ranks: what a step trains with is what `algo` says of its log-probs, in any layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_vespo.algo.coefficients import COEFFICIENTS, Ratios, coefficient
from megatron_vespo.algo.kernel import solved_lam
from megatron_vespo.config import AlgorithmConfig, CorrectionConfig, VespoConfig
from tests.trainer.tiny import largest_gap, trained, trainer_config

BUDGET = AlgorithmConfig(vespo=VespoConfig(budget=0.8))
ESS = AlgorithmConfig(vespo=VespoConfig(ess_target=0.97))
ZERO_MEAN = AlgorithmConfig(zero_mean=True)
PROXIMAL = AlgorithmConfig(
    reference="proximal", correction=CorrectionConfig(kind="token_tis", band=(0, 1.05))
)
WIDE = {"tensor": 2, "context": 2, "max_tokens": 64}
PIPED = {"pipeline": 2, "data": 2, "max_tokens": 64}


@pytest.fixture(scope="module")
def batch(moderate_batch):
    """Three groups of two, one good and one bad response in each."""
    return [
        replace(s, advantage=(1.0, -1.0)[i % 2] * (1 + i // 2), group=i // 2)
        for i, s in enumerate(moderate_batch)
    ]


def ratios_of(batch, logp, reference, **more) -> Ratios:
    """Of whole sequences, from lists of [T] arrays."""
    masks = [trained(s) for s in batch]
    ratio = [(a.astype(float) - b)[m] for a, b, m in zip(logp, reference, masks, strict=True)]
    return Ratios(
        log_ratio_S=torch.tensor(np.concatenate(ratio)),
        log_w_N=torch.tensor([r.sum() for r in ratio]),
        num_tokens_N=torch.tensor([float(m.sum()) for m in masks]),
        seq_S=torch.tensor(np.repeat(np.arange(len(batch)), [m.sum() for m in masks])),
        **more,
    )


def means(values_S, ratios) -> np.ndarray:
    return (np.bincount(ratios.seq_S, values_S) / ratios.num_tokens_N.numpy()).astype(float)


def expected(algorithm, batch, logp, **more) -> np.ndarray:
    """[B] mean coefficient against the behavior."""
    ratios = ratios_of(batch, logp, [s.behavior_logp for s in batch], **more)
    return means(coefficient(algorithm, ratios, torch.tensor([s.advantage for s in batch])).numpy(), ratios)


@pytest.mark.parametrize("name", [name for name in COEFFICIENTS if name != "reinforce"])
def test_a_step_trains_with_the_coefficients_of_its_log_probs(pool, tiny_moe, batch, name):
    algorithm = AlgorithmConfig(name=name)
    step = pool.grid(trainer_config(**WIDE), tiny_moe, algorithm=algorithm).step(batch)
    want = expected(algorithm, batch, [s.logp for s in step.scored])
    np.testing.assert_allclose(step.coefficient, want, rtol=1e-5)
    assert len(np.unique(want.round(6))) > 1, "the batch must tell methods from no correction"


@pytest.mark.parametrize("algorithm", [BUDGET, ESS], ids=["budget", "ess"])
def test_an_adapted_kernel_sees_the_whole_update(pool, tiny_moe, batch, algorithm):
    grid = pool.grid(trainer_config(**PIPED), tiny_moe, algorithm=algorithm)
    step = grid.step(batch)
    np.testing.assert_allclose(
        step.coefficient, expected(algorithm, batch, [s.logp for s in step.scored]), rtol=1e-4
    )
    assert (
        np.abs(step.coefficient - expected(AlgorithmConfig(), batch, [s.logp for s in step.scored])).max()
        > 1e-3
    )
    assert "survey" in step.time_s


@pytest.mark.parametrize("algorithm", [ZERO_MEAN, PROXIMAL], ids=["zero_mean", "proximal"])
def test_the_layout_changes_nothing(pool, tiny_moe, batch, algorithm):
    results = []
    for axes in ({}, WIDE, PIPED):
        grid = pool.grid(trainer_config(**axes), tiny_moe, algorithm=algorithm)
        results.append((grid.step(batch), grid.weights()))
    (alone, weights), *others = results
    for step, same in others:
        np.testing.assert_allclose(step.coefficient, alone.coefficient, rtol=1e-4)
        assert step.loss == pytest.approx(alone.loss, rel=1e-4)
        assert step.grad_norm == pytest.approx(alone.grad_norm, rel=1e-4)
        assert largest_gap(same, weights) < 1e-6


def test_a_survey_repeats_the_expert_choices_that_are_trained_with(pool, tiny_moe, batch):
    cfg = trainer_config(**PIPED).model_copy(update={"router_replay": "trainer"})
    step = pool.grid(cfg, tiny_moe, algorithm=BUDGET, updates_per_batch=3).step(batch)
    for share in (
        slice(0, 2),
        slice(2, 4),
        slice(4, 6),
    ):  # each update solved for its own lam, at its own log W
        k, budget = np.array([2.0, 3.0]), BUDGET.vespo.budget
        lam = [
            solved_lam(torch.tensor([w]), power, budget)
            for w, power in zip(step.log_w[share], k, strict=True)
        ]
        np.testing.assert_allclose(
            step.coefficient[share],
            np.exp(k * step.log_w[share] - lam * np.expm1(step.log_w[share])),
            rtol=1e-5,
        )
    assert np.abs(step.log_w[2:]).min() > 1e-6


def test_zero_mean_advantages_are_trained_on(pool, tiny_moe, batch):
    step = pool.grid(trainer_config(**WIDE), tiny_moe, algorithm=ZERO_MEAN).step(batch)
    c, a = step.coefficient, np.array([s.advantage for s in batch])
    pair = [slice(0, 2), slice(2, 4), slice(4, 6)]
    shifted = np.concatenate([a[g] - (c[g] * a[g]).sum() / c[g].sum() for g in pair])
    tokens = sum(int(trained(s).sum()) for s in batch)
    sums = np.array([x.logp[trained(s)].sum(dtype=float) for x, s in zip(step.scored, batch, strict=True)])
    assert step.loss == pytest.approx(-(c * shifted * sums).sum() / tokens, rel=1e-5)
    assert np.abs(shifted - a).min() > 1e-3


# ------------------------------------------------------------------------------------ references


@pytest.mark.parametrize("axes", [{}, WIDE], ids=str)
def test_with_a_proximal_reference_the_engine_is_a_factor_of_its_own(pool, tiny_moe, batch, axes):
    algorithm = PROXIMAL.model_copy(update={"name": "vespo"})
    grid = pool.grid(trainer_config(**axes), tiny_moe, algorithm=algorithm, updates_per_batch=3)
    start = grid.score(batch)
    step = grid.step(batch)
    rho = ratios_of(batch, [s.logp for s in start], [s.behavior_logp for s in batch])
    factor = means(np.minimum(np.exp(rho.log_ratio_S.numpy()), 1.05), rho)
    np.testing.assert_allclose(step.log_w[:2], 0, atol=1e-6)  # the first update is on the reference itself
    np.testing.assert_allclose(step.coefficient[:2], factor[:2], rtol=1e-5)
    later = np.abs(step.log_w[2:])
    assert 1e-5 < later.max() < 0.5, "drift alone, and none of the engine's 0.1 nats a token"
    # phi of the drift, times the factor, which is constant over a sequence's phi
    k, lam = np.where(np.array([s.advantage for s in batch]) > 0, [[2.0], [3.0]], [[3.0], [2.0]])
    phi = np.exp(k * step.log_w - lam * np.expm1(step.log_w))
    np.testing.assert_allclose(step.coefficient, phi * factor, rtol=1e-5)


def test_the_noise_of_the_engine_is_taken_out_of_w(pool, tiny_moe, batch):
    algorithm = AlgorithmConfig(vespo=VespoConfig(noise_aware=True))
    grid = pool.grid(trainer_config(**WIDE), tiny_moe, algorithm=algorithm)
    step = grid.step(batch, noise_variance=0.01)
    noise = 0.01 * np.array([trained(s).sum() for s in batch])
    x = (step.log_w + noise / 2) / (1 + noise)
    k, lam = np.where(np.array([s.advantage for s in batch]) > 0, [[2.0], [3.0]], [[3.0], [2.0]])
    np.testing.assert_allclose(step.coefficient, np.exp(k * x - lam * np.expm1(x)), rtol=1e-5)


# ------------------------------------------------------------------------------------ pace


def test_the_rate_follows_the_effective_sample_size(pool, tiny_moe, batch):
    algorithm = AlgorithmConfig(ess_learning_rate=True)
    step = pool.grid(trainer_config(**PIPED), tiny_moe, algorithm=algorithm).step(batch)
    w = np.exp(step.log_w)
    assert step.learning_rate == pytest.approx(1e-3 * np.sqrt(w.sum() ** 2 / (6 * (w**2).sum())), rel=1e-6)


def test_a_spent_batch_is_left(pool, tiny_moe, batch):
    cfg = trainer_config(**WIDE, optimizer={"learning_rate": 1e-4})
    far = [replace(s, behavior_logp=s.behavior_logp - 2) if i in (2, 3) else s for i, s in enumerate(batch)]
    guarded = AlgorithmConfig(min_living_weight=0.2)
    grid = pool.grid(cfg, tiny_moe, algorithm=guarded, updates_per_batch=3)
    step = grid.step(far)
    assert len(step.updates) == 2 and len(step.log_w) == len(step.coefficient) == 4
    assert step.coefficient[2:].max() < 0.2 and len(step.scored) == 6
    weights = grid.weights()
    near = [replace(s, behavior_logp=x.logp) for s, x in zip(batch, grid.score(batch), strict=True)]
    assert len(grid.step(near, 1).updates) == 3, "the next batch is trained on as a whole"
    short = pool.grid(cfg, tiny_moe, algorithm=AlgorithmConfig(), updates_per_batch=2)
    short.step(far[:4])
    assert largest_gap(weights, short.weights()) < 1e-7
