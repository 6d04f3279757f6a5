"""The trainer's step on real ranks: every layout computes what one rank, and transformers, compute.

The scaling rule proved here is "sum, never average": gradients do not depend on data, tensor, pipeline, context or
expert ranks, nor on microbatches, order or padding. Not covered: CUDA, Transformer Engine, expert_tensor > 1 with
expert > 1 (refused on gloo).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_batch, trainer_config

from megatron_vespo.config import AlgorithmConfig, ConfigError
from megatron_vespo.types import RunError

VESPO = AlgorithmConfig(name="vespo")
LAYOUTS = [
    {"tensor": 2},
    {"pipeline": 2},
    {"expert": 2, "data": 2},
    {"data": 2},
    {"context": 2},
    {"tensor": 2, "context": 2},
    {"tensor": 2, "pipeline": 2, "expert": 2},
    {"pipeline": 4},
    {"data": 4, "expert": 2},
    {"tensor": 2, "data": 2, "expert": 2},
    {"context": 2, "data": 2, "expert": 2},
]


@pytest.fixture(scope="module")
def batch():
    return make_batch(6, behavior_noise=0.05)


@pytest.fixture(scope="module")
def one_rank(pool, tiny_moe, batch):
    grid = pool.grid(trainer_config(), tiny_moe, algorithm=VESPO)
    return grid.gradients(batch), grid.step(batch), grid.weights()


def largest_gap(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_every_layout_gives_the_gradients_and_numbers_of_one_rank(pool, tiny_moe, batch, one_rank, axes):
    gradients, step, weights = one_rank
    grid = pool.grid(trainer_config(**axes), tiny_moe, algorithm=VESPO)
    assert largest_gap(grid.gradients(batch), gradients) < 1e-6
    got = grid.step(batch)
    for a, b in zip(got.scored, step.scored, strict=True):
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)
        np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-5)
        np.testing.assert_array_equal(np.sort(a.experts), np.sort(b.experts))
    np.testing.assert_allclose(got.log_w, step.log_w, atol=1e-5)
    np.testing.assert_allclose(got.coefficient, step.coefficient, rtol=1e-4)
    assert got.loss == pytest.approx(step.loss, abs=1e-6)
    assert got.grad_norm == pytest.approx(step.grad_norm, rel=1e-5)
    assert (
        largest_gap(grid.weights(), weights) < 1e-4
    )  # Adam's first step amplifies 1e-8 noise of tiny gradients


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "expert": 2},
        {"tensor": 2, "pipeline": 2, "expert": 2},
        {"context": 2},
        {"data": 4, "expert": 2},
    ],
    ids=str,
)
def test_the_distributed_optimizer_takes_the_same_step(pool, tiny_moe, batch, one_rank, axes):
    _, step, weights = one_rank
    grid = pool.grid(trainer_config(optimizer={"distributed": True}, **axes), tiny_moe, algorithm=VESPO)
    assert grid.step(batch).grad_norm == pytest.approx(step.grad_norm, rel=1e-5)
    assert largest_gap(grid.weights(), weights) < 1e-4


@pytest.mark.parametrize("axes", [{}, {"pipeline": 2}, {"data": 2, "expert": 2}], ids=str)
def test_microbatches_and_order_change_no_gradient(pool, tiny_moe, batch, one_rank, axes):
    grid = pool.grid(trainer_config(max_tokens=32, **axes), tiny_moe, algorithm=VESPO)
    assert largest_gap(grid.gradients(batch[::-1]), one_rank[0]) < 1e-6


def test_recomputation_changes_nothing_and_experts_are_captured_once(pool, tiny_moe, batch, one_rank):
    cfg = trainer_config(max_tokens=64, pipeline=2).model_copy(update={"recompute": True})
    grid = pool.grid(cfg, tiny_moe, algorithm=VESPO)
    assert largest_gap(grid.gradients(batch), one_rank[0]) < 1e-6
    for a, b in zip(grid.step(batch).scored, one_rank[1].scored, strict=True):
        np.testing.assert_array_equal(np.sort(a.experts), np.sort(b.experts))


# ------------------------------------------------------------------------------- against transformers


def hf_reference(directory, batch, temperature):
    """transformers' log-probs, entropies and experts, and the gradient of the SFT-like loss by parameter name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    total = sum(s.num_response_tokens for s in batch)
    loss, results = 0.0, []
    for s in batch:
        options = {"output_router_logits": True} if "moe" in model.config.model_type else {}
        out = model(torch.tensor(s.token_ids[None, :-1].astype(np.int64)), **options)
        everything = torch.log_softmax(out.logits[0] / temperature, -1)[s.num_prompt_tokens - 1 :]
        label = torch.tensor(s.token_ids[s.num_prompt_tokens :].astype(np.int64))
        logp = everything.gather(1, label[:, None])[:, 0]
        loss = loss - s.advantage * logp.sum() / total
        entropy = -(everything.exp() * everything).sum(-1)
        router = [logits.topk(2).indices for logits in out.router_logits] if options else None
        experts = torch.stack(router, 1).numpy() if router else None
        results.append((logp.detach().numpy(), entropy.detach().numpy(), experts))
    loss.backward()
    return results, dict(unfused(model))


def unfused(model):
    """Gradients by checkpoint name: in memory transformers keeps all experts of a layer in one tensor."""
    for name, parameter in model.named_parameters():
        prefix = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(parameter.grad):
                for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    yield f"{prefix}.{e}.{part}_proj.weight", half.numpy()
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(parameter.grad):
                yield f"{prefix}.{e}.down_proj.weight", down.numpy()
        else:
            yield name, parameter.grad.numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("tiny_moe", {"tensor": 2, "pipeline": 2, "expert": 2}),
        ("tiny_dense", {"tensor": 2, "pipeline": 2}),
        ("tiny_dense", {}),
    ],
    ids=str,
)
def test_log_probs_entropies_experts_and_gradients_are_those_of_transformers(
    pool, request, batch, kind, axes, temperature
):
    directory = request.getfixturevalue(kind)
    reference, gradients = hf_reference(directory, batch, temperature)
    grid = pool.grid(trainer_config(**axes), directory, temperature=temperature)
    for got, (logp, entropy, experts) in zip(grid.score(batch), reference, strict=True):
        np.testing.assert_allclose(got.logp, logp, atol=1e-5)
        np.testing.assert_allclose(got.entropy, entropy, atol=1e-5)
        if experts is None:
            assert got.experts is None
        else:
            np.testing.assert_array_equal(np.sort(got.experts), np.sort(experts))
    assert largest_gap(grid.gradients(batch), gradients) < 1e-6


# ------------------------------------------------------------------------------------ known answers


def with_log_ratios(grid, batch, ratios):
    """The batch with behavior log-probs that make the given policy - behavior log-ratios."""
    return [
        replace(s, behavior_logp=(scored.logp - np.array(r, np.float32)))
        for s, scored, r in zip(batch, grid.score(batch), ratios, strict=True)
    ]


@pytest.mark.parametrize(
    ("axes", "max_tokens"),
    [
        ({}, 512),
        ({}, 8),
        ({"data": 2}, 512),
        ({"context": 2}, 512),
        ({"tensor": 2, "pipeline": 2, "expert": 2}, 512),
    ],
    ids=str,
)
def test_the_known_answer_of_the_whole_loss(pool, tiny_moe, axes, max_tokens):
    # log W = .2, -.3, .4; phi(2,3) of .2 and phi(3,2) of the others; A = 1, -.5, -.5; 9 response tokens
    phi = np.array([0.767813607022, 0.682743225286, 1.241537591639])
    slope = np.array(
        [-0.0853126230025, 0.0379301791826, 0.0689743106466]
    )  # d loss / d logp, constant in a sequence
    sizes, advantages = (2, 3, 4), (1.0, -0.5, -0.5)
    rng = np.random.default_rng(5)
    batch = [
        replace(s, token_ids=rng.integers(0, 272, 3 + n).astype(np.int32), num_prompt_tokens=3, advantage=a)
        for s, n, a in zip(make_batch(3), sizes, advantages, strict=True)
    ]
    grid = pool.grid(trainer_config(max_tokens=max_tokens, **axes), tiny_moe, algorithm=VESPO)
    batch = with_log_ratios(grid, batch, ([0.1, 0.1], [-0.3, -0.1, 0.1], [0.0, -0.2, 0.2, 0.4]))
    step = grid.step(batch)
    np.testing.assert_allclose(step.log_w, [0.2, -0.3, 0.4], atol=1e-5)
    np.testing.assert_allclose(step.coefficient, phi, rtol=2e-5)
    assert step.loss == pytest.approx(
        sum(c * s.logp.sum(dtype=float) for c, s in zip(slope, step.scored, strict=True)), rel=1e-5
    )


def test_supervised_steps_raise_the_likelihood_of_the_demonstrations(pool, tiny_moe):
    batch = [replace(s, advantage=1.0) for s in make_batch(4, seed=3)]
    grid = pool.grid(trainer_config(tensor=2, expert=2), tiny_moe)
    losses = [grid.step(batch, i, capture_experts=False).loss for i in range(8)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert losses[0] - losses[-1] > 0.5


def test_the_learning_rate_rises_linearly_and_then_stays(pool, tiny_dense, batch):
    grid = pool.grid(trainer_config(optimizer={"warmup_steps": 4}), tiny_dense)
    rates = [grid.step(batch, i).learning_rate for i in (0, 1, 3, 9)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 1e-3])


def test_a_step_without_capture_reports_no_experts(pool, tiny_moe, batch):
    step = pool.grid(trainer_config(), tiny_moe).step(batch, capture_experts=False)
    assert all(scored.experts is None for scored in step.scored)


# ------------------------------------------------------------------------------------ failures


def test_a_non_finite_log_prob_names_sequence_step_and_rank_and_changes_no_weight(pool, tiny_moe, batch):
    grid = pool.grid(trainer_config(tensor=2, pipeline=2, expert=2), tiny_moe)
    before = grid.weights()
    grid.call("poison", float("nan"))
    with pytest.raises(
        RunError,
        match=r"sequence prompt-\d: its log-prob is not finite, at step 7 on rank \d \(tp \d, pp 1, ep \d\)",
    ):
        grid.step(batch, 7)
    with pytest.raises(RunError, match="its log-prob is not finite, found while scoring") as scoring:
        grid.score(batch)
    assert "no weight was changed" not in str(scoring.value)
    grid.call("poison", 1.0)  # what the tiny model has there
    assert largest_gap(grid.weights(), before) == 0.0
    assert np.isfinite(grid.step(batch, 8).loss)  # the ranks are still in step with one another


@pytest.mark.parametrize(
    ("advantage", "message"),
    [
        (1e308, r"sequence prompt-\d: its loss is not finite, at step 3"),
        (1e150, "gradient norm = (inf|nan) at step 3"),
    ],
)
@pytest.mark.parametrize(("kind", "axes"), [("tiny_moe", {"data": 2, "expert": 2}), ("tiny_dense", {})])
def test_overflow_of_the_loss_or_of_the_gradient_stops_before_the_update(
    pool, request, batch, kind, axes, advantage, message
):
    grid = pool.grid(trainer_config(**axes), request.getfixturevalue(kind))
    before = grid.weights()
    with pytest.raises(RunError, match=message):
        grid.step([replace(s, advantage=advantage) for s in batch], 3)
    assert largest_gap(grid.weights(), before) == 0.0
    assert set(grid.call("num_steps")) == {0}


def test_the_rank_with_the_log_prob_is_named_and_not_one_that_sees_only_its_sequence(pool, tiny_moe):
    """The last of 8 inputs is the first context rank's; the second one sees it through log W, without its token."""
    long, short = make_batch(2, behavior_noise=0.05)
    long = replace(
        long,
        token_ids=np.arange(9, dtype=np.int32),
        num_prompt_tokens=3,
        advantage=0.5,
        behavior_logp=np.full(6, -5.0, np.float32),
    )
    short = replace(
        short,
        token_ids=np.arange(6, dtype=np.int32),
        num_prompt_tokens=3,
        advantage=-2.0,
        behavior_logp=np.full(3, -5.0, np.float32),
    )
    grid = pool.grid(trainer_config(context=2), tiny_moe, algorithm=VESPO)
    grid.call("poison_output", 0)
    with pytest.raises(
        RunError, match=r"sequence prompt-0: its log-prob is not finite, at step 3 on rank 0 \(cp 0\)"
    ):
        grid.step([long, short], 3)


def test_optimizer_steps_are_counted(pool, tiny_dense, batch):
    grid = pool.grid(trainer_config(data=2), tiny_dense)
    counts = [grid.call("num_steps")]
    for i in range(2):
        grid.step(batch, i)
        counts.append(grid.call("num_steps"))
    assert counts == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_prompt_tokens": 0}, "sequence prompt-0: 0 prompt tokens of"),
        ({"num_prompt_tokens": 99}, "sequence prompt-0: 99 prompt tokens of"),
        ({"token_ids": np.array([1, 2, 3, 272], np.int32)}, r"token 272, expected 0 \.\. 271"),
        ({"advantage": float("nan")}, "advantage = nan, must be finite"),
        ({"behavior_logp": np.zeros(1, np.float32)}, r"behavior_logp must hold \d+ finite numbers"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_broken_sequence_is_named(pool, tiny_moe, change, message):
    grid = pool.grid(trainer_config(), tiny_moe)
    first, *others = make_batch(2)
    first = replace(first, num_prompt_tokens=3)
    with pytest.raises(RunError, match=message):
        grid.step([replace(first, **change), *others])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            {"moe_router_topkk": 2},
            "unknown field 'trainer.megatron.moe_router_topkk': did you mean 'moe_router_topk'",
        ),
        ({"moe_aux_loss_coeff": 0.1}, "trainer.megatron.moe_aux_loss_coeff: cannot be overridden"),
        ({"tensor_model_parallel_size": 2}, "cannot be overridden, set trainer.layout.tensor; take it out"),
        ({"params_dtype": "bfloat16"}, "trainer.megatron.params_dtype: cannot be overridden"),
        ({"kv_channels": 8}, "trainer.megatron.kv_channels: cannot be overridden"),
        ({"moe_router_dtype": "fp64"}, "trainer.megatron.moe_router_dtype: cannot be overridden"),
    ],
    ids=str,
)
def test_unknown_or_owned_megatron_fields_are_refused_before_anything_starts(override, message):
    from megatron_vespo.trainer.model import check_overrides

    with pytest.raises(ConfigError, match=message):
        check_overrides(trainer_config().model_copy(update={"megatron": override}))


def test_every_field_that_the_trainer_sets_is_refused_or_a_performance_switch(tiny_moe):
    from megatron_vespo.trainer import model
    from megatron_vespo.trainer.hf_config import read_model_shape

    cfg, shape = trainer_config(), read_model_shape(tiny_moe)
    for name in model._model_fields(shape) | model._numeric_fields(cfg) | model._layout_fields(cfg):
        with pytest.raises(ConfigError, match="cannot be overridden"):
            model.check_overrides(cfg.model_copy(update={"megatron": {name: None}}))
    model.check_overrides(cfg.model_copy(update={"megatron": model._switches(cfg, shape)}))


def test_a_megatron_field_reaches_the_model(pool, tiny_moe, batch, one_rank):
    cfg = trainer_config().model_copy(update={"megatron": {"moe_router_topk_scaling_factor": 2.0}})
    assert abs(pool.grid(cfg, tiny_moe, algorithm=VESPO).step(batch).loss - one_rank[1].loss) > 1e-4


def test_transformer_engine_by_name_is_refused_on_cpu(pool, tiny_moe):
    cfg = trainer_config().model_copy(update={"implementation": "transformer_engine"})
    with pytest.raises(
        ConfigError, match=r"trainer\.implementation = 'transformer_engine': it needs device = 'cuda'"
    ):
        pool.grid(cfg, tiny_moe)
