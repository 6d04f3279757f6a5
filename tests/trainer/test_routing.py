"""Router record and replay on real ranks: exact in every layout and under recomputation, and refused where it cannot be.

The foreign choices of these tests are the routers' own ones, each moved on by one expert, so that a replay that does
nothing would be far off. The independent reference is transformers with its router's choice overwritten.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_vespo.types import RunError
from tests.trainer.tiny import VESPO, largest_gap, make_batch, trained, trainer_config

NUM_EXPERTS = 8


def replaying(source, recompute="none", **axes):
    return trainer_config(**axes).model_copy(update={"router_replay": source, "recompute": recompute})


@pytest.fixture(scope="module")
def foreign_batch(pool, tiny_moe, moderate_batch):
    scored = pool.grid(trainer_config(), tiny_moe).score(moderate_batch)
    return [
        replace(s, experts=((x.experts + 1) % NUM_EXPERTS).astype(np.int16))
        for s, x in zip(moderate_batch, scored, strict=True)
    ]


@pytest.fixture(scope="module")
def replayed_on_one_rank(pool, tiny_moe, foreign_batch):
    grid = pool.grid(replaying("engine"), tiny_moe, algorithm=VESPO)
    return grid.gradients(foreign_batch), grid.step(foreign_batch)


def test_gradients_under_replay_are_those_of_transformers_with_the_same_experts(
    pool, tiny_moe, foreign_batch
):
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32, attn_implementation="eager")
    total = sum(s.num_trained_tokens for s in foreign_batch)
    for s in foreign_batch:
        for layer, block in enumerate(model.model.layers):
            block.mlp.gate.forward = overwritten(block.mlp.gate, s.experts[:, layer])
        logits = model(torch.from_numpy(s.token_ids[None, :-1].astype(np.int64))).logits[0].log_softmax(-1)
        label = torch.from_numpy(s.token_ids[1:].astype(np.int64))
        logp = logits.gather(1, label[:, None])[s.num_prompt_tokens - 1 :, 0]
        (-s.advantage * logp[torch.from_numpy(trained(s))].sum() / total).backward()
    gradients = pool.grid(replaying("engine"), tiny_moe).gradients(foreign_batch)
    for name, parameter in model.named_parameters():
        if "experts" not in name:  # transformers fuses those; the router and all below depend on them
            assert np.abs(gradients[name] - parameter.grad.numpy()).max() < 1e-6, name


def overwritten(gate, experts):
    """transformers' router with the given choices: gate weights are a softmax over their logits."""

    def forward(hidden):
        logits = torch.nn.functional.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
        chosen = torch.from_numpy(experts.astype(np.int64))
        return logits, logits.gather(1, chosen).softmax(-1), chosen

    return forward


@pytest.mark.parametrize(
    ("axes", "recompute"),
    [
        ({"max_tokens": 32}, "full"),
        ({"tensor": 2, "max_tokens": 64}, "selective"),
        ({"pipeline": 2, "max_tokens": 64}, "full"),
        ({"pipeline": 2, "virtual_pipeline": 2, "max_tokens": 32}, "none"),
        ({"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2, "max_tokens": 32}, "full"),
        ({"data": 4, "expert": 4, "max_tokens": 32}, "none"),
        ({"context": 2, "max_tokens": 64}, "full"),
        ({"tensor": 2, "context": 2, "max_tokens": 64}, "full"),
        ({"tensor": 2, "pipeline": 2, "expert": 2, "max_tokens": 64}, "selective"),
        ({"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2, "max_tokens": 32}, "none"),
    ],
    ids=str,
)
def test_replay_of_the_engines_choices_is_exact_in_every_layout(
    pool, tiny_moe, foreign_batch, replayed_on_one_rank, axes, recompute
):
    gradients, step = replayed_on_one_rank
    grid = pool.grid(replaying("engine", recompute, **axes), tiny_moe, algorithm=VESPO)
    assert largest_gap(grid.gradients(foreign_batch), gradients) < 1e-6
    got = grid.step(foreign_batch)
    for a, b in zip(got.scored, step.scored, strict=True):
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)
        np.testing.assert_array_equal(np.sort(a.experts), np.sort(b.experts))


def test_replay_changes_the_log_probs_and_reports_what_the_trainer_would_have_chosen(
    pool, tiny_moe, foreign_batch, replayed_on_one_rank
):
    own = pool.grid(trainer_config(), tiny_moe).score(foreign_batch)
    _, step = replayed_on_one_rank
    assert max(np.abs(a.logp - b.logp).max() for a, b in zip(own, step.scored, strict=True)) > 0.1
    for free, shadow in zip(own, step.scored, strict=True):  # layer 0 sees the same input either way
        np.testing.assert_array_equal(np.sort(shadow.experts[:, 0]), np.sort(free.experts[:, 0]))


def test_scoring_never_replays(pool, tiny_moe, foreign_batch):
    free = pool.grid(trainer_config(), tiny_moe).score(foreign_batch)
    got = pool.grid(replaying("engine"), tiny_moe).score(foreign_batch)
    for a, b in zip(got, free, strict=True):
        np.testing.assert_array_equal(a.logp, b.logp)


@pytest.mark.parametrize(
    ("axes", "recompute"),
    [
        ({"max_tokens": 32}, "none"),
        ({"pipeline": 2, "virtual_pipeline": 2, "max_tokens": 32}, "full"),
        ({"tensor": 2, "data": 2, "expert": 2, "max_tokens": 32}, "selective"),
    ],
    ids=str,
)
def test_replay_of_the_trainers_own_choices_holds_them_through_the_updates_on_a_batch(
    pool, tiny_moe, moderate_batch, axes, recompute
):
    """The second update replays what the start of the batch chose, as the engine's replay of those choices would."""
    big_steps = {"optimizer": {"learning_rate": 0.3}}
    start = pool.grid(trainer_config(), tiny_moe).score(moderate_batch)
    given = [replace(s, experts=x.experts) for s, x in zip(moderate_batch, start, strict=True)]
    results = {}
    for source, batch in (("engine", given), ("trainer", moderate_batch), ("off", moderate_batch)):
        cfg = replaying(source, recompute, **axes, **big_steps)
        grid = pool.grid(cfg, tiny_moe, algorithm=VESPO, updates_per_batch=2)
        results[source] = grid.step(batch), grid.weights()
    (engine, engine_weights), (trainer, weights), (_, free) = results.values()
    np.testing.assert_allclose(trainer.log_w, engine.log_w, atol=1e-4)
    assert largest_gap(weights, engine_weights) < 1e-4
    assert largest_gap(weights, free) > 1e-3, (
        "the second update chose the same experts anyway: the test shows nothing"
    )


def test_several_updates_replay_the_engines_choices_from_the_start(
    pool, tiny_moe, foreign_batch, replayed_on_one_rank
):
    grid = pool.grid(replaying("engine", "full"), tiny_moe, algorithm=VESPO, updates_per_batch=2)
    for a, b in zip(grid.step(foreign_batch).scored, replayed_on_one_rank[1].scored, strict=True):
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)


# ---------------------------------------------------------------------------------- passes that tell causes apart


@pytest.fixture(scope="module")
def examined_on_one_rank(pool, tiny_moe, foreign_batch):
    return pool.grid(trainer_config(), tiny_moe).examine(foreign_batch)


@pytest.mark.parametrize(
    "axes",
    [
        {"max_tokens": 32},
        {"tensor": 2, "context": 2, "max_tokens": 64},
        {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2, "max_tokens": 32},
        {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2, "max_tokens": 32},
    ],
    ids=str,
)
def test_an_examination_says_the_same_in_every_layout(
    pool, tiny_moe, foreign_batch, examined_on_one_rank, axes
):
    got = pool.grid(trainer_config(**axes), tiny_moe).examine(foreign_batch)
    for a, b in zip(got, examined_on_one_rank, strict=True):
        for ours, theirs in ((a.natural, b.natural), (a.replayed, b.replayed)):
            np.testing.assert_allclose(ours.logp, theirs.logp, atol=1e-5)
            np.testing.assert_array_equal(np.sort(ours.experts), np.sort(theirs.experts))
        np.testing.assert_allclose(a.repeat, b.natural.logp, atol=1e-5)
        np.testing.assert_allclose(a.margin, b.margin, atol=1e-5, rtol=2**-10)


def test_the_passes_of_an_examination_are_scoring_and_replay(
    pool, tiny_moe, foreign_batch, examined_on_one_rank, replayed_on_one_rank
):
    free = pool.grid(trainer_config(), tiny_moe).score(foreign_batch)
    for got, natural, replayed in zip(
        examined_on_one_rank, free, replayed_on_one_rank[1].scored, strict=True
    ):
        np.testing.assert_array_equal(got.natural.logp, natural.logp)
        np.testing.assert_array_equal(got.natural.experts, natural.experts)
        np.testing.assert_allclose(got.replayed.logp, replayed.logp, atol=1e-6)
        np.testing.assert_array_equal(np.sort(got.replayed.experts), np.sort(replayed.experts))


def test_margins_are_those_of_the_scores_that_transformers_selects_by(
    tiny_moe, foreign_batch, examined_on_one_rank
):
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32, attn_implementation="eager")
    logits: list[torch.Tensor] = []
    for block in model.model.layers:
        block.mlp.gate.register_forward_hook(
            lambda gate, inputs, _: logits.append(inputs[0].reshape(-1, gate.hidden_dim) @ gate.weight.T)
        )
    for s, got in zip(foreign_batch, examined_on_one_rank, strict=True):
        logits.clear()
        with torch.no_grad():
            model(torch.from_numpy(s.token_ids[None, :-1].astype(np.int64)))
        best = torch.stack(logits, 1).sort(-1, descending=True).values
        np.testing.assert_allclose(got.margin, (best[..., 1] - best[..., 2]).numpy(), atol=1e-5, rtol=2**-10)


def test_replaying_the_trainers_own_choices_changes_nothing(
    pool, tiny_moe, moderate_batch, examined_on_one_rank
):
    own = [
        replace(s, experts=x.natural.experts)
        for s, x in zip(moderate_batch, examined_on_one_rank, strict=True)
    ]
    cfg = trainer_config(pipeline=2, virtual_pipeline=2, max_tokens=32)
    for got in pool.grid(cfg, tiny_moe).examine(own):
        np.testing.assert_allclose(got.replayed.logp, got.natural.logp, atol=1e-6)
        np.testing.assert_array_equal(np.sort(got.replayed.experts), np.sort(got.natural.experts))


def test_what_cannot_be_replayed_is_left_out_of_that_pass_alone(
    pool, tiny_moe, foreign_batch, examined_on_one_rank
):
    grid = pool.grid(trainer_config(data=2), tiny_moe)
    broken = [without_experts, with_a_row_of_zeros, with_a_sentinel, with_short_rows]
    batch = [*(b(s) for b, s in zip(broken, foreign_batch, strict=False)), *foreign_batch[len(broken) :]]
    before = grid.weights()
    got = grid.examine(batch)
    assert [x.replayed is None for x in got] == [True] * 4 + [False] * 2
    for a, b in zip(got, examined_on_one_rank, strict=True):
        np.testing.assert_allclose(a.natural.logp, b.natural.logp, atol=1e-5)
        if a.replayed is not None:
            np.testing.assert_allclose(a.replayed.logp, b.replayed.logp, atol=1e-5)
    assert largest_gap(grid.weights(), before) == 0.0


def test_a_dense_model_has_no_margins_and_replays_nothing(pool, tiny_dense):
    (got,) = pool.grid(trainer_config(), tiny_dense).examine(make_batch(1))
    assert got.margin is None and got.replayed is None and got.natural.experts is None
    np.testing.assert_allclose(got.repeat, got.natural.logp, atol=1e-5)


def without_experts(s):
    return replace(s, experts=None)


def with_short_rows(s):
    return replace(s, experts=s.experts[:-1])


def with_fewer_layers(s):
    return replace(s, experts=s.experts[:, :3])


def with_a_sentinel(s):
    return replace(s, experts=np.where(np.arange(len(s.experts))[:, None, None] == 2, -1, s.experts))


def with_an_unknown_expert(s):
    return replace(s, experts=np.where(s.experts == 3, NUM_EXPERTS, s.experts))


def with_a_row_of_zeros(s):
    return replace(s, experts=np.where(np.arange(len(s.experts))[:, None, None] == 2, 0, s.experts))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (without_experts, "sequence prompt-1: has no expert choices, but trainer.router_replay = 'engine'"),
        (with_short_rows, r"sequence prompt-1: expert choices have shape \[\d+, 4, 2\], expected"),
        (with_fewer_layers, r"sequence prompt-1: expert choices have shape \[\d+, 3, 2\], expected"),
        (with_a_sentinel, r"sequence prompt-1: expert choices lie in -1 \.\. \d, expected 0 \.\. 7"),
        (with_an_unknown_expert, r"sequence prompt-1: expert choices lie in \d \.\. 8, expected 0 \.\. 7"),
        (
            with_a_row_of_zeros,
            "sequence prompt-1: a row of expert choices names one expert twice, at step 4 on rank",
        ),
    ],
)
def test_unusable_choices_are_refused_on_every_rank_and_change_no_weight(
    pool, tiny_moe, foreign_batch, broken, message
):
    grid = pool.grid(replaying("engine", pipeline=2, data=2), tiny_moe, algorithm=VESPO)
    before = grid.weights()
    with pytest.raises(RunError, match=message):
        grid.step([broken(s) if s.uid == "prompt-1" else s for s in foreign_batch], 4)
    assert largest_gap(grid.weights(), before) == 0.0
    assert np.isfinite(grid.step(foreign_batch, 4).loss)  # the ranks are still in step with one another


def test_a_frozen_router_keeps_its_weights_and_everything_else_learns(pool, tiny_moe, moderate_batch):
    cfg = trainer_config(pipeline=2, optimizer={"distributed": True}).model_copy(
        update={"freeze_router": True}
    )
    grid = pool.grid(cfg, tiny_moe, algorithm=VESPO)
    before = grid.weights()
    grid.step(moderate_batch)
    changed = {name for name, weight in grid.weights().items() if not np.array_equal(weight, before[name])}
    routers = {name for name in before if name.endswith("mlp.gate.weight")}
    assert len(routers) == 4 and not changed & routers
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} >= {
        "q_proj",
        "lm_head",
        "gate_proj",
    }


@pytest.mark.parametrize(
    "axes",
    [
        {"tensor": 2},
        {"context": 2},
        {"pipeline": 2, "virtual_pipeline": 2, "max_tokens": 24},
        {"tensor": 2, "context": 2},
    ],
    ids=str,
)
def test_the_load_balancing_loss_has_one_gradient_in_every_layout(pool, tiny_moe, axes):
    """It is defined by microbatch, so these are the same: one of four segments, or four of one (24 inputs each)."""
    long = [s for s in make_batch(24) if len(s.token_ids) >= 25][:4]
    batch = [replace(s, token_ids=s.token_ids[:25], advantage=0.0) for s in long]
    assert len(batch) == 4

    def gradients(**axes):
        cfg = trainer_config(**axes).model_copy(update={"moe_aux_loss_coeff": 0.1})
        return pool.grid(cfg, tiny_moe).gradients(batch)

    alone = gradients(max_tokens=axes.get("max_tokens", 512))
    assert max(np.abs(g).max() for g in alone.values()) > 1e-3
    assert largest_gap(gradients(**axes), alone) < 1e-6
