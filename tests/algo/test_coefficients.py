"""Coefficients: VESPO against known answers, every method against autograd through its published objective.

The objectives are written from the papers, on padded [B, T] matrices, and share no code with the package.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vespo.algo.coefficients import COEFFICIENTS, Ratios, coefficient
from megatron_vespo.algo.loss import policy_loss
from megatron_vespo.config import AlgorithmConfig, Method
from tests.algo.ragged import Ragged, loss_and_gradient, random_batch, ratios, whole

VESPO = AlgorithmConfig(name="vespo")
METHODS: list[Method] = list(get_args(Method))


def phi(log_w: float, advantage: float, algorithm: AlgorithmConfig = VESPO) -> float:
    """phi of one sequence of one token, in float64."""
    return coefficient(algorithm, whole([log_w]), torch.tensor([advantage])).item()


# ---- VESPO


@pytest.mark.parametrize(
    ("w", "positive", "negative"),
    [
        (0.01, 1.94919196e-3, 7.242742985e-6),
        (0.1, 0.1487973172, 0.006049647464),
        (0.25, 0.5929834898, 0.07002639172),
        (0.5, 1.120422268, 0.3397852286),
        (2 / 3, 1.208125257, 0.5771063825),
        (0.9, 1.093385634, 0.8904026107),
        (1, 1, 1),
        (1.5, 0.5020428603, 1.241593114),
        (2, 0.1991482735, 1.082682266),
        (3, 0.02230876959, 0.49452225),
        (5, 1.536053088e-4, 0.04193282849),
        (10, 1.879528817e-10, 1.522997974e-5),
        (math.exp(-20), 8.5330475730e-17, 6.4702348990e-26),
        (math.exp(-10), 4.1393738985e-08, 6.9137723089e-13),
        (math.exp(-5), 8.9363437675e-04, 2.2300737663e-06),
        (math.exp(-2), 2.4512037815e-01, 1.3972410581e-02),
        (math.exp(-1), 9.0155130837e-01, 1.7626638407e-01),
        (math.exp(-0.1), 1.0892482135, 8.9612547561e-01),
        (math.exp(0.1), 8.9090920931e-01, 1.0938003193),
        (math.exp(0.5), 3.8822748404e-01, 1.2245304429),
        (math.exp(1), 4.2644989758e-02, 6.4625335808e-01),
        (math.exp(1.5), 5.8431682656e-04, 8.5146826621e-02),
        (math.exp(2), 2.5881086401e-07, 1.1384219865e-03),
        (math.exp(3), 5.4895504631e-23, 2.1436979731e-13),
    ],
)
def test_known_answers(w, positive, negative):
    assert phi(math.log(w), advantage=+1) == pytest.approx(positive, rel=1e-8)
    assert phi(math.log(w), advantage=-1) == pytest.approx(negative, rel=1e-8)


def test_phi_of_one_is_exactly_one_and_zero_advantage_counts_as_positive():
    assert phi(0.0, +1) == phi(0.0, -1) == 1.0
    assert phi(0.5, 0.0) == phi(0.5, +1) != phi(0.5, -1)


@pytest.mark.parametrize("log_w", [-1e4, -200, -100, 100, 200, 1e4])
def test_far_off_policy_is_zero_without_nan(log_w):
    # the slowest decay is W^2 at W = exp(-100): e^3 * e^-200
    assert 0 <= phi(log_w, -1) <= phi(log_w, +1) < 1e-85


def test_the_sign_is_that_of_the_sequence_and_not_of_a_token():
    log_ratio = torch.full((2,), 0.25, dtype=torch.float64)
    c = coefficient(VESPO, ratios([log_ratio, log_ratio]), torch.tensor([-1.0, 1.0]))
    assert c.tolist() == pytest.approx([1.2245304429] * 2 + [0.38822748404] * 2, rel=1e-9)


def test_splitting_a_sequence_changes_its_coefficient():
    parts = [torch.tensor([0.3], dtype=torch.float64), torch.tensor([-0.1, 0.4], dtype=torch.float64)]
    together = coefficient(VESPO, ratios([torch.cat(parts)]), torch.tensor([1.0]))
    split = coefficient(VESPO, ratios(parts), torch.tensor([1.0, 1.0]))
    assert (together == together[0]).all() and not torch.isclose(split, together).any()


@settings(deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_tokens_means_nothing(log_ratio, random):
    shuffled = log_ratio.copy()
    random.shuffle(shuffled)
    c, d = (
        coefficient(VESPO, ratios([torch.tensor(x, dtype=torch.float64)]), torch.tensor([-1.0]))
        for x in (log_ratio, shuffled)
    )
    torch.testing.assert_close(c, d)


@pytest.mark.parametrize(("exponent", "log_w"), [(0.0, 0.8), (0.5, 0.4), (1.0, 0.2)])
def test_length_exponent_normalises_log_w(exponent, log_w):
    algorithm = AlgorithmConfig.model_validate({"vespo": {"length_exponent": exponent}})
    c = coefficient(algorithm, whole([0.8], tokens=4), torch.tensor([1.0]))
    assert c.tolist() == pytest.approx([phi(log_w, +1)] * 4)


def test_noise_aware_phi_sees_what_the_noise_leaves_of_log_w():
    algorithm = AlgorithmConfig.model_validate({"vespo": {"noise_aware": True}})
    one = dataclasses.replace(whole([-0.7], tokens=10), noise_variance=0.1)
    # s = 1, so that (-0.7 + 1/2) / 2 = -0.1
    assert coefficient(algorithm, one, torch.tensor([1.0])).tolist() == pytest.approx([phi(-0.1, +1)] * 10)


def test_a_budget_solves_lam_for_each_sign_from_sequences_that_have_signal_and_tokens():
    algorithm = AlgorithmConfig.model_validate({"vespo": {"budget": 1.0}})
    # W in {1/2, 2}: lam = 2/3 (k log 4 + log 2), see test_kernel.py; k = 2 where A > 0, 3 where A < 0
    log_w = math.log(2) * torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    advantage = torch.tensor([1.0, 2.0, -1.0, -2.0, 0.0])
    c = coefficient(algorithm, whole(log_w.tolist()), advantage)
    for i, k, w in [(0, 2, 0.5), (1, 2, 2.0), (2, 3, 0.5), (3, 3, 2.0)]:
        lam = 2 / 3 * (k * math.log(4) + math.log(2))
        assert c[i].item() == pytest.approx(w**k * math.exp(lam * (1 - w)), rel=1e-9)
    alone = coefficient(algorithm, whole([0.5]), torch.tensor([0.0]))
    assert alone.item() == pytest.approx(phi(0.5, 0.0))  # nothing to solve for: lam of the configuration


def test_an_ess_target_flattens_phi_by_one_power_for_all():
    algorithm = AlgorithmConfig.model_validate({"vespo": {"ess_target": 0.8}})
    log_w, advantage = [-1.5, 0.9, 0.1, -0.2, 3.0], torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    c = coefficient(algorithm, whole(log_w), advantage)
    plain = coefficient(VESPO, whole(log_w), advantage)
    power = c.log() / plain.log()
    assert 0.1 < power[0] < 1 and torch.allclose(power, power[0])
    living = c[:4]  # the last one has no gradient
    assert (living.sum() ** 2 / living.square().sum() / 4).item() == pytest.approx(0.8)
    assert torch.equal(coefficient(algorithm, whole([3.0]), torch.tensor([0.0])), plain[4:])


# ---- VESPO on a problem that can be enumerated: 9 responses of 2 tokens out of 3


class Enumerable:
    """pi and mu over all 9 responses; E_mu is a sum, so that every gradient is exact."""

    def __init__(self, seed: int, spread: float) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        # logits of the first token, then of the second one given the first
        first, second = normal(3), normal(3, 3)
        self.parameters = [
            (first + spread * normal(3)).requires_grad_(),
            (second + spread * normal(3, 3)).requires_grad_(),
        ]
        self.mu = self.log_prob([first, second]).exp()
        self.advantage = normal(9)
        self.advantage -= (self.mu * self.advantage).sum()

    @staticmethod
    def log_prob(logits: list[Tensor]) -> Tensor:
        return (logits[0].log_softmax(0)[:, None] + logits[1].log_softmax(1)).flatten()

    def ratios(self) -> Ratios:
        first, second = (x.log_softmax(-1) for x in self.parameters)
        log_w = (first[:, None] + second).detach().flatten() - self.mu.log()
        return whole(log_w.tolist(), tokens=2)

    def gradient(self, objective: Tensor) -> Tensor:
        gradients = torch.autograd.grad(objective, self.parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in gradients])

    def score(self) -> Tensor:
        """[9, 12] grad log pi of each response."""
        return torch.stack([self.gradient(log_pi) for log_pi in self.log_prob(self.parameters)])


def lower_gamma(k: int, x: Tensor) -> Tensor:
    """gamma(k, x) of whole k in closed form: (k - 1)! (1 - exp(-x) sum_{j<k} x^j / j!)."""
    return math.factorial(k - 1) * (1 - (-x).exp() * sum(x**j / math.factorial(j) for j in range(k)))


def vespo_objective(w: Tensor, advantage: Tensor) -> Tensor:
    """f(W) A with f = exp(lam) lam^-k gamma(k, lam W)."""
    positive = math.exp(3) / 9 * lower_gamma(2, 3 * w)
    negative = math.exp(2) / 8 * lower_gamma(3, 2 * w)
    return torch.where(advantage >= 0, positive, negative) * advantage


@pytest.mark.parametrize("seed", range(5))
def test_the_detached_form_is_the_true_gradient_of_the_surrogate(seed):
    problem = Enumerable(seed, spread=0.7)
    log_pi = problem.log_prob(problem.parameters)
    surrogate = (problem.mu * vespo_objective(log_pi.exp() / problem.mu, problem.advantage)).sum()
    c = coefficient(VESPO, problem.ratios(), problem.advantage)[::2]
    loss = policy_loss(log_pi, c, problem.advantage, problem.mu)
    torch.testing.assert_close(problem.gradient(-loss), problem.gradient(surrogate), rtol=1e-10, atol=1e-14)


def test_bias_is_exactly_ordered_as_theory_says():
    # |E_mu[c A grad log pi] - grad E_pi[A]|^2, averaged over problems with W mostly in [1/2, 2]
    family = {f"phi_{order}": (order + 1.0, float(order)) for order in (1, 2)}
    algorithms = {
        name: AlgorithmConfig(name=name) for name in ("importance_sampling", "reinforce", "topr", "vespo")
    }
    for name, (k, lam) in family.items():
        algorithms[name] = AlgorithmConfig.model_validate({"vespo": {"k": (k, k), "lam": (lam, lam)}})
    bias = dict.fromkeys(algorithms, 0.0)
    for seed in range(4):
        problem = Enumerable(seed, spread=0.3)
        exact = problem.gradient((problem.log_prob(problem.parameters).exp() * problem.advantage).sum())
        score = problem.score()
        for name, algorithm in algorithms.items():
            c = coefficient(algorithm, problem.ratios(), problem.advantage)[::2]
            estimate = (problem.mu * c * problem.advantage) @ score
            bias[name] += float((estimate - exact).square().sum())
    assert bias["importance_sampling"] < 1e-25
    # unbiased to first order < no correction < the deployed kernel, whose positive branch is deliberately biased
    assert bias["phi_1"] < bias["phi_2"] < 0.5 * bias["reinforce"] < 0.5 * bias["vespo"]
    assert bias["topr"] < bias["reinforce"]


# ---- every method against its published objective


@dataclass(frozen=True)
class Padded:
    """What an objective is a function of: [B, T] matrices and a column of advantages."""

    logp: Tensor
    old: Tensor
    mask: Tensor
    a: Tensor

    @property
    def r(self) -> Tensor:
        return ((self.logp - self.old) * self.mask).exp()

    @property
    def log_w(self) -> Tensor:
        return ((self.logp - self.old) * self.mask).sum(1, keepdim=True)

    @property
    def w(self) -> Tensor:
        return self.log_w.exp()

    @property
    def s(self) -> Tensor:
        """GSPO-token, section 4.3: the ratio of the sequence, with the gradient of one token."""
        one = (self.logp - self.logp.detach()).exp()
        return (self.log_w / self.mask.sum(1, keepdim=True)).exp().detach() * one

    @property
    def tau(self) -> Tensor:
        return torch.where(self.a > 0, 1.0, 1.05 * torch.ones_like(self.a))


def ppo(ratio: Tensor, a: Tensor, low: float, high: float, dual: float = math.inf) -> Tensor:
    clipped = torch.minimum(ratio * a, ratio.clamp(low, high) * a)
    return torch.where(a < 0, torch.maximum(clipped, dual * a), clipped)


SEQUENCE_OBJECTIVES: dict[str, Callable[[Padded], Tensor]] = {
    "vespo": lambda b: vespo_objective(b.w, b.a),
    "importance_sampling": lambda b: b.w * b.a,
}
"""[B, 1]: true functions of W."""
TOKEN_OBJECTIVES: dict[str, Callable[[Padded], Tensor]] = {
    "reinforce": lambda b: b.a * b.logp,
    "seq_tis": lambda b: b.w.clamp(max=2.0).detach() * b.a * b.logp,
    "seq_mis": lambda b: (b.w * ((b.w >= 0.5) & (b.w <= 2.0))).detach() * b.a * b.logp,
    "topr": lambda b: torch.where(b.a >= 0, 1.0, b.w.clamp(0, 1)).detach() * b.a * b.logp,
    "grpo": lambda b: ppo(b.r, b.a, 0.8, 1.28, dual=3.0),
    "gspo": lambda b: ppo(b.s, b.a, 1 - 3e-4, 1 + 4e-4),
    "sapo": lambda b: 4 / b.tau * torch.sigmoid(b.tau * (b.r - 1)) * b.a,
    "cispo": lambda b: b.r.clamp(max=1.28).detach() * b.a * b.logp,
    "bapo": lambda b: ppo(b.r, b.a, *brute_force_bounds(b.r.detach(), b.a, b.mask), dual=3.0),
    "m2po": lambda b: b.r * brute_force_mask(b.logp.detach() - b.old, b.mask) * b.a,
}
"""[B, T]: to be summed over the tokens of each response."""


def objective(name: str, batch: Padded) -> Tensor:
    """[B] what the method's authors maximise, of each response."""
    if name in SEQUENCE_OBJECTIVES:
        return SEQUENCE_OBJECTIVES[name](batch)[:, 0]
    return (TOKEN_OBJECTIVES[name](batch) * batch.mask).sum(1)


def brute_force_bounds(r: Tensor, a: Tensor, mask: Tensor) -> tuple[float, float]:
    """BAPO: the first pair of a list of all pairs, in their order, at which positive samples have half the weight."""
    lows = [0.8, 0.85, 0.9, 0.95]
    highs = [1.2 + 0.05 * i for i in range(17)]  # 1.2, 1.25 ... 2.0
    pairs = [(low, highs[0]) for low in lows] + [(lows[-1], high) for high in highs]
    for low, high in pairs:
        total = {+1: 0.0, -1: 0.0}
        for ratio, advantage in zip(r[mask > 0].tolist(), a.expand_as(r)[mask > 0].tolist(), strict=True):
            if advantage:
                sign = math.copysign(1, advantage)
                bounded = min(ratio, high) if sign > 0 else max(ratio, low)
                total[int(sign)] += bounded * abs(advantage)
        if total[+1] >= 0.5 * total[-1]:
            break
    return low, high


def brute_force_mask(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """M2PO, algorithm 1: remove the token of the largest (log r)^2 until the mean over the others is within 0.04."""
    square, kept = log_ratio**2, mask.clone()
    while kept.any() and (square * kept).sum() / kept.sum() > 0.04:
        kept.view(-1)[(square * kept - (1 - kept)).argmax()] = 0
    return kept


AGGREGATES = {
    "token_mean": lambda total, mask: total.sum() / mask.sum(),
    "seq_mean_token_sum": lambda total, mask: total.mean(),
    "seq_mean_token_mean": lambda total, mask: (total / mask.sum(1)).mean(),
}
PUBLISHED = dict.fromkeys(METHODS, "token_mean") | {
    "gspo": "seq_mean_token_mean",
    "sapo": "seq_mean_token_mean",
    "topr": "seq_mean_token_sum",
}


def published_gradient(name: str, batch: Ragged, aggregation: str) -> Tensor:
    """d loss / d log pi of the batch's tokens, packed, through the published objective."""
    logp, old = batch.padded()
    mask = batch.mask_BT
    padded = Padded(logp, old, mask, batch.advantage_B[:, None])
    loss = -AGGREGATES[aggregation](objective(name, padded), mask)
    (gradient,) = torch.autograd.grad(loss, logp)
    return gradient[mask > 0]


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1, 0.5, 5.0])
@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_that_of_the_published_objective(name, scale):
    batch = random_batch(METHODS.index(name), scale, num=24)
    for aggregation in AGGREGATES:
        _, gradient = loss_and_gradient(AlgorithmConfig(name=name, aggregation=aggregation), batch)
        expected = published_gradient(name, batch, aggregation)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-14)


def test_the_default_aggregation_is_the_one_of_the_methods_authors():
    assert {name: AlgorithmConfig(name=name).resolved_aggregation for name in METHODS} == PUBLISHED
    assert AlgorithmConfig(name="gspo", aggregation="token_mean").resolved_aggregation == "token_mean"


def test_the_random_batches_reach_every_case():
    # else the comparison above would prove less than it seems to: coefficients that are cut, or moved, exist in numbers
    def share(name: str, scale: float) -> float:
        c = [
            coefficient(AlgorithmConfig(name=name), batch.ratios(), batch.advantage_B)[
                batch.advantage_B[batch.seq_S] != 0
            ]
            for batch in (random_batch(seed, scale) for seed in range(5))
        ]
        return float((torch.cat(c) == 0).double().mean())

    assert all(0.05 < share(name, 0.5) < 0.95 for name in ("grpo", "gspo", "bapo", "m2po", "seq_mis"))


def test_bapo_widens_its_bounds_until_positive_samples_have_their_share():
    # P = 0.41 min(1.5, high), M = 1 + 0.001 max(0.9, low): 0.492 < 0.5 M at high = 1.2, 0.5125 > 0.5 M at 1.25; raising the
    # lower bound, which is tried first, helps nothing and leaves it at 0.95
    batch = whole([math.log(r) for r in (1.5, 1.0, 0.9, 1.24, 1.26)])
    c = coefficient(AlgorithmConfig(name="bapo"), batch, torch.tensor([0.41, -1, -0.001, 1e-9, 1e-9]))
    assert c.tolist() == pytest.approx([0, 1, 0, 1.24, 0])
    balanced = coefficient(AlgorithmConfig(name="bapo"), batch, torch.tensor([0.5, -1, -0.001, 1e-9, 1e-9]))
    assert balanced.tolist() == pytest.approx([0, 1, 0.9, 0, 0])


def test_gspo_is_the_gradient_of_its_sequence_objective():
    # section 4.1: mean over responses of min(s A, clip(s) A), s = (pi / mu)^(1 / T), differentiated through s itself
    for seed in range(10):
        batch = random_batch(seed, 1e-3)
        logp, old = batch.padded()
        mask, a = batch.mask_BT, batch.advantage_B
        s = (((logp - old) * mask).sum(1) / mask.sum(1)).exp()
        loss = -torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a).mean()
        (expected,) = torch.autograd.grad(loss, logp)
        _, gradient = loss_and_gradient(AlgorithmConfig(name="gspo"), batch)
        torch.testing.assert_close(gradient, expected[mask > 0], rtol=1e-9, atol=1e-14)


def test_m2po_keeps_as_many_tokens_as_any_subset_could():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        log_ratio = 0.3 * torch.randn(9, generator=generator, dtype=torch.float64)
        subsets = ((torch.arange(512)[:, None] >> torch.arange(9)) & 1).double()
        within = (subsets @ log_ratio.square()) <= 0.04 * subsets.sum(1) + 1e-15
        most = subsets.sum(1)[within].max()
        c = coefficient(AlgorithmConfig(name="m2po"), ratios([log_ratio]), torch.tensor([1.0]))
        assert (c > 0).sum() == most


@pytest.mark.parametrize(
    ("name", "log_ratio", "positive", "negative"),
    [
        ("grpo", math.log(1.28) - 1e-9, 1.28, 1.28),
        ("grpo", math.log(1.28) + 1e-9, 0, 1.28),
        ("grpo", math.log(0.8) + 1e-9, 0.8, 0.8),
        ("grpo", math.log(0.8) - 1e-9, 0.8, 0),
        ("grpo", math.log(3) - 1e-9, 0, 3),
        ("grpo", math.log(3) + 1e-9, 0, 0),
        ("gspo", math.log(1.0004) + 1e-9, 0, 1.0004),
        ("gspo", math.log(0.9997) - 1e-9, 0.9997, 0),
        ("cispo", 1.0, 1.28, 1.28),
        ("cispo", -5.0, math.exp(-5), math.exp(-5)),
        ("topr", 1.0, 1, 1),
        ("topr", -1.0, 1, math.exp(-1)),
        ("seq_tis", 1.0, 2, 2),
        ("seq_mis", math.log(2) + 1e-9, 0, 0),
        ("seq_mis", math.log(0.5) + 1e-9, 0.5, 0.5),
        ("sapo", math.log(2.06), 1.57467, 1.53626 * (1 - 2e-3)),  # the largest values, tau = 1 and 1.05
        ("m2po", 0.2 - 1e-9, math.exp(0.2), math.exp(0.2)),
        ("m2po", 0.2 + 1e-9, 0, 0),
    ],
)
def test_band_edges(name, log_ratio, positive, negative):
    algorithm = AlgorithmConfig(name=name)
    assert phi(log_ratio, +1, algorithm) == pytest.approx(positive, rel=2e-3 if name == "sapo" else 1e-6)
    assert phi(log_ratio, -1, algorithm) == pytest.approx(negative, rel=2e-3 if name == "sapo" else 1e-6)


# ---- what holds for all of them


def test_on_policy_every_algorithm_is_reinforce():
    for name in METHODS:
        c = coefficient(AlgorithmConfig(name=name), whole([0.0, 0.0], tokens=2), torch.tensor([1.0, -1.0]))
        assert c.tolist() == [1, 1, 1, 1], name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("log_ratio", [-1e4, -800.0, 30.0, 800.0, 1.4e3])
def test_absurd_ratios_give_numbers_and_none_without_advantage(name, log_ratio):
    sequences = ratios(
        [torch.tensor([log_ratio, 0.1], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    )
    for advantage in ([1.0, -1.0], [-1.0, 1.0], [0.0, 1.0]):
        c = coefficient(AlgorithmConfig(name=name), sequences, torch.tensor(advantage))
        # GSPO has no upper bound where A < 0, importance sampling none at all
        assert c.isfinite().all() if name in ("gspo", "importance_sampling") else c.max() <= 3
        assert (c >= 0).all()
    assert (c * torch.tensor(advantage)[sequences.seq_S])[:2].tolist() == [0, 0]


OPTIONS = [
    *({"name": name} for name in METHODS),
    {"vespo": {"length_exponent": 0.5}},
    {"vespo": {"noise_aware": True}},
    {"vespo": {"budget": 0.8}},
    {"vespo": {"ess_target": 0.9}},
    {"reference": "proximal", "correction": {"kind": "token_tis"}},
    {"reference": "proximal", "correction": {"kind": "icepop"}},
    {"reference": "proximal", "correction": {"kind": "sequence_mask"}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_depends_on_other_sequences_is_said_to_need_the_whole_update(options):
    algorithm = AlgorithmConfig.model_validate(options)
    differs = False
    for seed in range(2):
        batch = random_batch(seed, 0.4)
        log_ratio = [pi - mu for pi, mu in zip(batch.log_pi, batch.log_mu, strict=True)]
        log_rho = [0.05 * x.flip(0) for x in log_ratio]
        together = coefficient(algorithm, ratios(log_ratio, log_rho, noise=0.01), batch.advantage_B)
        order = [4, 2, 5, 0, 3, 1]
        alone = {
            i: coefficient(
                algorithm, ratios([log_ratio[i]], [log_rho[i]], noise=0.01), batch.advantage_B[i : i + 1]
            )
            for i in order
        }
        differs |= not torch.allclose(together, torch.cat([alone[i] for i in sorted(alone)]), rtol=1e-12)
        # whatever it depends on, the order of sequences in the pack is not it
        packed = coefficient(
            algorithm,
            ratios([log_ratio[i] for i in order], [log_rho[i] for i in order], noise=0.01),
            batch.advantage_B[order],
        ).split([len(log_ratio[i]) for i in order])
        reordered = torch.cat([packed[order.index(i)] for i in range(6)])
        torch.testing.assert_close(reordered, together, rtol=1e-9, atol=1e-15)
    assert differs == algorithm.needs_whole_update


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sequence_without_trained_tokens_and_an_empty_microbatch_change_nothing(options):
    algorithm = AlgorithmConfig.model_validate(options)
    some = [torch.tensor(x, dtype=torch.float64) for x in ([0.3, -0.1], [0.2], [-0.9], [-0.5])]
    none = torch.zeros(0, dtype=torch.float64)
    c = coefficient(algorithm, ratios(some, some), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    more = [some[0], none, *some[1:], none]
    with_empty = coefficient(algorithm, ratios(more, more), torch.tensor([1.0, 2.0, -1.0, 1.0, -1.0, -2.0]))
    torch.testing.assert_close(with_empty, c)
    empty = Ratios(
        log_ratio_S=none, log_w_N=none, num_tokens_N=none, seq_S=torch.zeros(0, dtype=torch.int64), log_rho_S=none, log_rho_N=none
    )  # fmt: skip
    assert coefficient(algorithm, empty, none).shape == (0,)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_coefficient_is_detached_and_of_the_dtype_of_the_ratios(options, dtype):
    log_ratio = [torch.tensor([0.1, -0.2], dtype=dtype, requires_grad=True)]
    c = coefficient(
        AlgorithmConfig.model_validate(options), ratios(log_ratio, log_ratio), torch.tensor([1.0])
    )
    assert not c.requires_grad and c.dtype == dtype


@pytest.mark.parametrize("name", [name for name in METHODS if name != "bapo"])  # its search looks at numbers
def test_no_tensor_is_made_on_another_device_than_the_ratios(name):
    # the meta device has shapes only, and refuses to meet a tensor of the CPU
    def meta(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    on_meta = Ratios(
        log_ratio_S=meta(5), log_w_N=meta(2), num_tokens_N=meta(2), seq_S=meta(5, dtype=torch.int64), log_rho_S=meta(5), log_rho_N=meta(2)
    )  # fmt: skip
    algorithm = AlgorithmConfig.model_validate(
        {"name": name, "reference": "proximal", "correction": {"kind": "icepop"}}
    )
    assert coefficient(algorithm, on_meta, meta(2)).device.type == "meta"


def test_every_method_of_the_configuration_has_a_coefficient():
    assert set(COEFFICIENTS) == set(METHODS)
