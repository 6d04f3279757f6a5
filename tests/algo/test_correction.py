"""The engine's factor by hand: what is truncated, what is dropped, what is dropped together."""

import math

import pytest
import torch

from megatron_vespo.algo.coefficients import coefficient
from megatron_vespo.algo.correction import correction
from megatron_vespo.config import AlgorithmConfig, CorrectionConfig
from tests.algo.ragged import ratios


def factors(kind: str, *rho: list[float], band: tuple[float, float] | None = None) -> list[float]:
    """m(rho) of sequences of tokens."""
    log_rho = [torch.tensor(x, dtype=torch.float64).log() for x in rho]
    seq = torch.repeat_interleave(torch.arange(len(rho)), torch.tensor([len(x) for x in rho]))
    mean = torch.stack([x.mean() for x in log_rho])
    cfg = CorrectionConfig.model_validate({"kind": kind, "band": band})
    return correction(cfg, torch.cat(log_rho), mean, seq).tolist()


def test_token_tis_truncates_from_above_and_keeps_what_is_small():
    assert factors("token_tis", [0.001, 1.0, 1.99], [2.01, 1e6]) == pytest.approx([0.001, 1, 1.99, 2, 2])


def test_icepop_drops_tokens_outside_of_its_band_alone():
    assert factors("icepop", [0.49, 0.51, 1.0], [4.99, 5.01]) == pytest.approx([0, 0.51, 1, 4.99, 0])


def test_sequence_mask_judges_the_geometric_mean_and_keeps_the_ratios_of_tokens():
    # geometric means: sqrt(4 / 4) = 1, 1.003, 0.9991
    assert factors("sequence_mask", [4.0, 0.25], [1.003, 1.003], [0.9991]) == pytest.approx(
        [4, 0.25, 0, 0, 0.9991]
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("token_tis", [0.9, 1, 1.1]), ("icepop", [0, 1, 0]), ("sequence_mask", [0, 1, 0])],
)
def test_a_band_of_ones_own(kind, expected):
    assert factors(kind, [0.8], [1.0], [1.2], band=(0.9, 1.1)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["token_tis", "icepop", "sequence_mask"])
def test_a_perfect_engine_is_not_corrected(kind):
    assert factors(kind, [1.0, 1.0], [1.0]) == [1, 1, 1]


@pytest.mark.parametrize("kind", ["token_tis", "icepop", "sequence_mask"])
def test_absurd_engines_give_numbers(kind):
    assert all(math.isfinite(m) for m in factors(kind, [1e-300, 1e300], [1e300], [1e-300]))


def test_the_factor_multiplies_the_coefficient_token_by_token_and_stays_out_of_the_kernel():
    log_ratio = [torch.tensor([0.1, -0.3], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)]
    log_rho = [torch.tensor([3.0, -0.5], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)]
    advantage = torch.tensor([1.0, -1.0])
    plain = coefficient(AlgorithmConfig(), ratios(log_ratio), advantage)
    corrected = AlgorithmConfig.model_validate({"reference": "proximal", "correction": {"kind": "token_tis"}})
    expected = plain * torch.tensor([2.0, math.exp(-0.5), math.exp(0.1)])
    torch.testing.assert_close(coefficient(corrected, ratios(log_ratio, log_rho), advantage), expected)
