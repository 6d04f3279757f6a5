"""phi, its surrogate, and what may be solved for, against quadrature, bisection, sampling and known values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.algo import kernel

POSITIVE, NEGATIVE = (2.0, 3.0), (3.0, 2.0)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


log_weights = st.lists(st.floats(-5, 5), min_size=1, max_size=12).map(lambda x: f64(*x))


# ---- phi


@pytest.mark.parametrize(
    ("k_lam", "argmax", "largest"), [(POSITIVE, 2 / 3, 1.208125257), (NEGATIVE, 3 / 2, 1.241593114)]
)
def test_phi_is_largest_at_k_over_lam(k_lam, argmax, largest):
    w = torch.linspace(0.01, 10, 1_000, dtype=torch.float64)
    phi = kernel.log_phi(w.log(), *k_lam).exp()
    assert kernel.log_phi(f64(argmax).log(), *k_lam).exp().item() == pytest.approx(largest, rel=1e-9)
    assert phi.max() <= largest * (1 + 1e-9)
    rising = phi.diff() > 0
    assert rising[w[1:] < argmax].all() and not rising[w[:-1] > argmax].any()


@pytest.mark.parametrize(
    ("k_lam", "argmax", "largest"), [(POSITIVE, 1 / 3, 2.4630186996), (NEGATIVE, 1.0, 1.0)]
)
def test_phi_over_w_is_bounded_as_the_variance_bound_needs(k_lam, argmax, largest):
    # Prop. 3.1: K = ((k - 1) / lam)^(k - 1) exp(lam - k + 1) at W = (k - 1) / lam
    w = torch.linspace(0.001, 10, 10_000, dtype=torch.float64)
    assert (kernel.log_phi(w.log(), *k_lam).exp() / w).max().item() == pytest.approx(largest, rel=1e-4)
    at = f64(argmax)
    assert (kernel.log_phi(at.log(), *k_lam).exp() / at).item() == pytest.approx(largest, rel=1e-9)


@pytest.mark.parametrize(("k_lam", "slope"), [(POSITIVE, -1.0), (NEGATIVE, +1.0)])
def test_near_w_1_positive_samples_back_off_and_negative_ones_are_importance_sampled(k_lam, slope):
    log_w = f64(0.0).requires_grad_()
    (gradient,) = torch.autograd.grad(kernel.log_phi(log_w, *k_lam), log_w)
    assert gradient.item() == slope


@pytest.mark.parametrize("log_w", [-1e4, -200, 200, 1e4])
@pytest.mark.parametrize("k_lam", [POSITIVE, NEGATIVE])
def test_far_off_policy_phi_fades_to_zero(log_w, k_lam):
    # the slowest decay is W^2 at W = exp(-200)
    assert 0 <= kernel.log_phi(f64(log_w), *k_lam).exp().item() < 1e-170


# ---- surrogate


@pytest.mark.parametrize(
    ("k_lam", "at_one", "at_infinity"),
    [(POSITIVE, 1.7872818804, 2.2317263248), (NEGATIVE, 0.5972640247, 1.8472640247)],
)
def test_surrogate_at_one_and_at_infinity(k_lam, at_one, at_infinity):
    f = kernel.surrogate(f64(0.0, 1.0, 1e3), *k_lam)
    assert f.tolist() == pytest.approx([0, at_one, at_infinity], rel=1e-9)


@pytest.mark.parametrize("k_lam", [POSITIVE, NEGATIVE, (0.7, 1.3)])
def test_surrogate_is_the_integral_of_phi_over_w(k_lam):
    # f(b) - f(a) = integral of phi dw / w = integral of phi d log w, by Simpson's rule
    a, b = -3.0, 1.2
    x = torch.linspace(a, b, 2_001, dtype=torch.float64)
    simpson = torch.ones_like(x)
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    integral = (simpson * kernel.log_phi(x, *k_lam).exp()).sum() * (b - a) / 2_000 / 3
    f = kernel.surrogate(f64(a, b).exp(), *k_lam)
    assert (f[1] - f[0]).item() == pytest.approx(integral.item(), rel=1e-11)


# ---- lam solved from a budget


def expected_w(log_w: np.ndarray, k: float, lam: float) -> float:
    """E_Q[W], Q ~ W^k exp(-lam W), directly in W."""
    w = np.exp(log_w)
    q = w**k * np.exp(-lam * (w - w.min()))
    return float((q * w).sum() / q.sum())


@settings(deadline=None)
@given(log_weights, st.floats(0.5, 4), st.floats(0.2, 3))
def test_solved_lam_is_what_bisection_finds(log_w, k, budget):
    low, high = 0.1, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        too_much = expected_w(log_w.numpy(), k, middle) > budget
        low, high = (middle, high) if too_much else (low, middle)
    # where W hardly varies, E_Q[W] hardly depends on lam: then what it is for must agree, not lam itself
    lam = kernel.solved_lam(log_w, k, budget)
    assert 0.1 <= lam <= 20
    assert lam == pytest.approx(low, abs=1e-6) or expected_w(log_w.numpy(), k, lam) == pytest.approx(
        expected_w(log_w.numpy(), k, low), abs=1e-9
    )


def test_the_budget_is_met_or_slack():
    log_w = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k, budget in [(1.0, 1.0), (2.0, 1.0), (2.0, 1.2), (3.0, 0.7)]:
        lam = kernel.solved_lam(log_w, k, budget)
        assert 0.1 < lam < 20
        assert expected_w(log_w.numpy(), k, lam) == pytest.approx(budget, rel=1e-9)
    assert kernel.solved_lam(log_w, 0.5, 100.0) == 0.1  # nothing to be held back


def test_a_tilt_of_k_is_undone_by_lam_near_k_where_drift_is_small():
    # W = 1 + e, E e = 0: E_Q[W] = 1 + (k - lam) Var e + ..., so that C = 1 is met at lam = k
    log_w = (0.01 * f64(-1, 1, -2, 2)).log1p()
    assert kernel.solved_lam(log_w, 2.0, 1.0) == pytest.approx(2.0, rel=1e-2)
    assert kernel.solved_lam(log_w, 1.0, 1.0) == pytest.approx(1.0, rel=1e-2)


def test_the_budget_of_enumerated_probabilities_gives_the_analytic_lam():
    # W in {1/2, 2} equally often: Q(2) / Q(1/2) = 4^k exp(-3/2 lam), and E_Q[W] = C at odds (C - 1/2) / (2 - C);
    # C = 1: odds 1/2, so lam = 2/3 (k log 4 + log 2)
    log_w = f64(0.5, 2.0).log()
    for k in (1.0, 2.0, 3.0):
        expected = 2 / 3 * (k * math.log(4) + math.log(2))
        assert kernel.solved_lam(log_w, k, 1.0) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("log_w", "lam"),
    [
        ([0.0] * 5, 0.1),  # E_Q[W] = 1 = C for any lam
        ([1.0] * 5, 20.0),  # E_Q[W] = e > C for any lam
        ([-700.0, -700.0], 0.1),
        ([700.0, 700.0], 20.0),
        ([0.0, 1e4], 0.1),  # the one that overflows has no weight in Q
    ],
)
def test_solved_lam_stays_within_bounds(log_w, lam):
    assert kernel.solved_lam(f64(*log_w), 2.0, 1.0) == lam


# ---- phi tempered to an effective sample size


def ess(weight: np.ndarray) -> float:
    return float(weight.sum() ** 2 / (len(weight) * np.square(weight).sum()))


@settings(deadline=None)
@given(log_weights, st.floats(0.05, 0.95))
def test_tempering_reaches_its_target_with_the_greatest_power(log_w, target):
    log_phi = kernel.log_phi(log_w, *NEGATIVE)
    s = kernel.tempered(log_phi, target)

    def share(power: float) -> float:
        return ess(np.exp(power * (log_phi - log_phi.max()).numpy()))

    if s == 1:
        assert share(1) >= target * (1 - 1e-9)
    elif s == 0.1:
        assert share(0.1 + 1e-6) < target * (1 + 1e-6)
    else:
        assert share(s) == pytest.approx(target, rel=1e-6)
    assert kernel.tempered(log_phi, target / 2) >= s  # a smaller target needs no more tempering


def test_weights_that_are_equal_enough_are_left_alone():
    assert kernel.tempered(f64(-0.1, 0.0, 0.1), 0.9) == 1.0
    assert kernel.tempered(f64(-5.0), 0.99) == 1.0  # one sequence has all of its own weight


@pytest.mark.parametrize(
    "log_phi", [[0.0, -math.inf, -math.inf], [-math.inf, -math.inf], [0.0, -1e300, -1e300]]
)
def test_dead_sequences_stay_dead_however_much_is_asked_for(log_phi):
    s = kernel.tempered(f64(*log_phi), 0.9)
    assert s == 0.1
    assert (s * f64(*log_phi[1:])).exp().tolist() == [0.0] * (len(log_phi) - 1)


# ---- log W without the engine's noise


@pytest.mark.parametrize(("num_tokens", "sigma2"), [(100, 0.001), (100, 0.02), (2_000, 0.01)])
def test_denoised_log_w_is_the_posterior_mean_of_the_drift(num_tokens, sigma2):
    random = np.random.default_rng(0)
    s = num_tokens * sigma2
    drift = random.normal(size=500_000)
    log_w = drift + random.normal(-s / 2, math.sqrt(s), size=len(drift))
    for quantile in (0.1, 0.5, 0.8):
        at = np.quantile(log_w, quantile)
        near = np.abs(log_w - at) < 0.05
        expected = kernel.denoised(f64(at), f64(num_tokens), sigma2).item()
        spread = drift[near].std() / math.sqrt(near.sum())
        assert drift[near].mean() == pytest.approx(expected, abs=4 * spread + 0.005)


def test_without_noise_log_w_is_left_alone_and_all_noise_is_left_uncorrected():
    log_w, num_tokens = f64(-3.0, 0.0, 2.0), f64(5, 50, 500)
    assert torch.equal(kernel.denoised(log_w, num_tokens, 0.0), log_w)
    s = 1e6  # log W of an unchanged policy: -s / 2, give or take 3 sqrt(s)
    explained = f64(*(-s / 2 + 3 * math.sqrt(s) * z for z in (-1, 0, 1)))
    assert kernel.denoised(explained, f64(1, 1, 1), s).abs().max().item() < 0.01
