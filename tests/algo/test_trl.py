"""TRL's GRPOTrainer is an independent reference: the same gradients from its own loss function.

What differs by convention, and is set here so that it agrees: TRL's `epsilon_high` of CISPO is the cap itself, `delta` is
the dual clip, and its GSPO is `loss_type` "grpo" with ratios of whole sequences.  TRL clamps log ratios of tokens to 20 and
log W to [-18.4, 20]; ours are not clamped, and the batches stay inside of that.  Where engine and trainer differ, TRL folds the
engine's ratio into VESPO's W; here that is reference = "behavior".
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from megatron_vespo.algo.coefficients import coefficient
from megatron_vespo.algo.loss import kl_penalty, policy_loss, token_weights
from megatron_vespo.config import AlgorithmConfig
from tests.algo.ragged import Ragged, loss_and_gradient, random_batch, ratios

DEFAULTS = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}


class StandIn:
    """As much of a GRPOTrainer as its loss looks at."""

    get_gamma_weights = staticmethod(GRPOTrainer.get_gamma_weights)
    model = SimpleNamespace(training=True)
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    top_entropy_quantile = 1.0
    aux_loss_enabled = _entropy_bonus_enabled = False
    off_policy_mask_threshold = None
    current_gradient_accumulation_steps = 1
    vllm_importance_sampling_correction = True

    def __init__(self, logp: Tensor, loss_type: str, options: dict[str, Any]) -> None:
        settings = DEFAULTS | {"steps_per_generation": 1} | options
        self.loss_type = loss_type
        self.importance_sampling_level = settings["importance_sampling_level"]
        self.beta, self.use_vllm = settings["beta"], settings["use_vllm"]
        self.epsilon_low, self.epsilon_high = (
            settings["epsilon"],
            settings["epsilon_high"] or settings["epsilon"],
        )
        self.args = SimpleNamespace(**settings)
        self._metrics = {"train": defaultdict(list)}
        self._logp = logp

    def _get_per_token_logps_and_entropies(self, *_: object, **__: object) -> tuple[Tensor, Tensor, None]:
        return self._logp, torch.zeros_like(self._logp), None


def trl(
    loss_type: str,
    batch: Ragged,
    old: Tensor | None = None,
    inputs: dict[str, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """TRL's loss, and d loss / d log pi of the packed tokens.

    Args:
        old: [B, T]; default: log mu.
    """
    logp, mu = batch.padded()
    mask = batch.mask_BT
    nothing = torch.zeros(len(mask), 0, dtype=torch.int64)
    loss = GRPOTrainer._compute_loss(
        StandIn(logp, loss_type, options),  # type: ignore[arg-type]
        None,
        {
            "prompt_ids": nothing,
            "prompt_mask": nothing,
            "completion_ids": torch.zeros_like(mask, dtype=torch.int64),
            "completion_mask": mask,
            "advantages": batch.advantage_B,
            "old_per_token_logps": mu if old is None else old,
            "num_items_in_batch": mask.sum(),
        }
        | (inputs or {}),
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient[mask > 0]


def test_the_defaults_are_those_of_trl():
    vespo, sapo = AlgorithmConfig().vespo, AlgorithmConfig().sapo
    ours = {
        "vespo_k_pos": vespo.k[0],
        "vespo_lambda_pos": vespo.lam[0],
        "vespo_k_neg": vespo.k[1],
        "vespo_lambda_neg": vespo.lam[1],
        "sapo_temperature_pos": sapo.tau[0],
        "sapo_temperature_neg": sapo.tau[1],
        "epsilon": AlgorithmConfig().grpo.clip[0],
    }
    assert ours == {name: DEFAULTS[name] for name in ours}


GRPO = {"epsilon": 0.2, "epsilon_high": 0.28, "delta": 3.0}
GSPO = {"epsilon": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"}


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1, 0.5, 1.5])
@pytest.mark.parametrize(
    ("name", "aggregation", "loss_type", "options"),
    [
        ("vespo", "published", "vespo", {}),
        ("grpo", "published", "dapo", GRPO),
        ("grpo", "seq_mean_token_mean", "grpo", GRPO),
        ("gspo", "published", "grpo", GSPO),
        ("gspo", "token_mean", "dapo", GSPO),
        ("gspo", "seq_mean_token_sum", "luspo", GSPO),
        ("sapo", "published", "sapo", {}),
        ("cispo", "published", "cispo", {"epsilon_high": 1.28}),
    ],
)
def test_gradients_agree(name, aggregation, loss_type, options, scale):
    algorithm = AlgorithmConfig(name=name, aggregation=aggregation)
    for seed in range(5):
        batch = random_batch(seed, scale)
        loss, gradient = loss_and_gradient(algorithm, batch)
        their_loss, their_gradient = trl(loss_type, batch, **options)
        # SAPO: TRL rounds 1.05 to float32
        torch.testing.assert_close(
            gradient, their_gradient, rtol=1e-6 if name == "sapo" else 1e-10, atol=1e-14
        )
        if name in ("vespo", "cispo"):  # the others write another loss with the same gradient
            torch.testing.assert_close(loss, their_loss, rtol=1e-10, atol=1e-14)


def test_gamma_weights_agree_where_trl_does_not_clamp_and_differ_where_it_does():
    def theirs(log_ratio: Tensor) -> Tensor:
        ones = torch.ones_like(log_ratio)
        return GRPOTrainer.get_gamma_weights(torch.ones(1, 1), log_ratio[None], ones[None], None)[0]

    def ours(log_ratio: Tensor) -> Tensor:
        return coefficient(AlgorithmConfig(), ratios([log_ratio]), torch.ones(1))[:1]

    within = torch.tensor([19.0, -19.5, 0.2], dtype=torch.float64)
    torch.testing.assert_close(ours(within), theirs(within), rtol=1e-12, atol=0)
    # W = exp(-15), phi = e^3 e^-30; TRL clamps the tokens to -20 and +20, and their sum is 0
    beyond = torch.tensor([-60.0, 45.0], dtype=torch.float64)
    assert theirs(beyond).item() == 1.0 and ours(beyond).item() == pytest.approx(math.exp(-27), rel=1e-5)


def test_the_penalty_agrees():
    batch = random_batch(0, 0.3)
    reference_BT = batch.padded()[1] + 0.2
    # TRL reweights the penalty by the ratio unless told otherwise; ours is that of GRPO, which does not
    options = GRPO | {"beta": 0.1, "use_bias_correction_kl": False}
    _, theirs = trl("dapo", batch, inputs={"ref_per_token_logps": reference_BT}, **options)
    logp = torch.cat(list(batch.log_pi)).requires_grad_()
    weight = torch.from_numpy(token_weights(batch.num_tokens, "token_mean"))[batch.seq_S]
    penalty = 0.1 * (weight * kl_penalty(logp, torch.cat(list(batch.log_mu)) + 0.2)).sum()
    penalty.backward()
    _, without = loss_and_gradient(AlgorithmConfig(name="grpo"), batch)
    assert logp.grad is not None
    torch.testing.assert_close(without + logp.grad, theirs, rtol=1e-10, atol=1e-14)


def engine_gap(batch: Ragged) -> tuple[list[Tensor], Tensor]:
    """log rho of the tokens of each response, and TRL's log pi_old [B, T]: log mu and that."""
    generator = torch.Generator().manual_seed(1)
    log_rho = [0.7 * torch.randn(n, generator=generator, dtype=torch.float64) for n in batch.num_tokens]
    padded = torch.nn.utils.rnn.pad_sequence(log_rho, batch_first=True)
    return log_rho, padded


@pytest.mark.parametrize(
    ("name", "loss_type", "options"), [("grpo", "dapo", GRPO), ("cispo", "cispo", {"epsilon_high": 1.28})]
)
def test_token_tis_is_trls_correction_for_its_engine(name, loss_type, options):
    batch = random_batch(0, 0.3)  # log mu is read as log pi_old here, and rho = pi_old / engine beside it
    log_rho, padded = engine_gap(batch)
    algorithm = AlgorithmConfig.model_validate(
        {"name": name, "reference": "proximal", "correction": {"kind": "token_tis"}}
    )
    own = [pi - mu for pi, mu in zip(batch.log_pi, batch.log_mu, strict=True)]
    c = coefficient(algorithm, ratios(own, log_rho), batch.advantage_B)
    logp = torch.cat(list(batch.log_pi)).requires_grad_()
    weight = torch.from_numpy(token_weights(batch.num_tokens, "token_mean"))[batch.seq_S]
    policy_loss(logp, c, batch.advantage_B[batch.seq_S], weight).backward()
    assert logp.grad is not None
    correction = {"importance_sampling_ratio": padded.exp().clamp(max=2.0)}
    _, theirs = trl(loss_type, batch, inputs=correction, use_vllm=True, **options)
    torch.testing.assert_close(logp.grad, theirs, rtol=1e-10, atol=1e-14)


def test_trls_vespo_with_the_engines_ratio_folded_in_is_ours_against_the_behavior():
    batch = random_batch(0, 0.3)
    _, padded = engine_gap(batch)
    _, ours = loss_and_gradient(AlgorithmConfig(), batch)
    old = batch.padded()[1] + padded  # pi_old = mu rho, so that pi / pi_old * rho = pi / mu
    _, theirs = trl(
        "vespo", batch, old=old, inputs={"importance_sampling_ratio": padded.exp()}, use_vllm=True
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
