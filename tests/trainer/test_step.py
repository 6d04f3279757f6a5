"""What happens with one batch, on real ranks: agreement with transformers, known answers, several updates, failures."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_vespo.config import AlgorithmConfig, ConfigError
from megatron_vespo.types import RunError
from tests.trainer.tiny import VESPO, largest_gap, make_batch, trained, trainer_config


@pytest.fixture(scope="module")
def batch():
    return make_batch(6, behavior_noise=0.05)


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
    losses = [grid.step(batch, i, routed=()).loss for i in range(8)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert losses[0] - losses[-1] > 0.5


def test_every_rank_and_stage_knows_all_importance_weights(pool, tiny_moe, moderate_batch):
    axes = {"pipeline": 2, "context": 2, "max_tokens": 64}
    grid = pool.grid(trainer_config(**axes), tiny_moe, algorithm=VESPO)
    outputs = grid.call("step", moderate_batch, 0, False)
    assert len(outputs) == 4
    for output in outputs:
        np.testing.assert_array_equal(output.log_w, outputs[0].log_w)
        np.testing.assert_array_equal(output.coefficient, outputs[0].coefficient)
        assert output.updates == outputs[0].updates
    assert (outputs[0].log_w != 0).all()
    assert len(outputs[0].logp) == 0, "the first stage has no log-prob of its own"


# ------------------------------------------------------------------------------------ several updates


@pytest.mark.parametrize("axes", [{}, {"pipeline": 2, "data": 2, "max_tokens": 64}], ids=str)
def test_two_updates_on_a_batch_are_two_steps_on_its_halves(pool, tiny_moe, moderate_batch, axes):
    halves = moderate_batch[:3], moderate_batch[3:]
    apart = pool.grid(trainer_config(**axes), tiny_moe, algorithm=VESPO)
    steps = [apart.step(half, i) for i, half in enumerate(halves)]
    together = pool.grid(trainer_config(**axes), tiny_moe, algorithm=VESPO, updates_per_batch=2)
    start = together.score(moderate_batch)
    both = together.step(moderate_batch)
    assert largest_gap(together.weights(), apart.weights()) < 1e-6
    assert [u.grad_norm for u in both.updates] == pytest.approx([s.grad_norm for s in steps], rel=1e-4)
    assert [u.loss for u in both.updates] == pytest.approx([s.loss for s in steps], abs=1e-5)
    np.testing.assert_allclose(both.log_w, np.concatenate([s.log_w for s in steps]), atol=1e-5)
    # reported are the log-probs of the batch's start, while log W is that of each sequence's own update
    for a, b in zip(both.scored, start, strict=True):
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-6)
    drift = [
        w - (x.logp - s.behavior_logp)[trained(s)].sum()
        for w, x, s in zip(both.log_w, start, moderate_batch, strict=True)
    ]
    assert np.abs(drift[:3]).max() < 1e-4 < np.abs(drift[3:]).max()


def test_the_learning_rate_counts_updates(pool, tiny_dense, batch):
    cfg = trainer_config(optimizer={"warmup_steps": 4})
    grid = pool.grid(cfg, tiny_dense, updates_per_batch=2)
    rates = [u.learning_rate for i in range(3) for u in grid.step(batch, i).updates]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_a_batch_that_cannot_be_divided_is_refused(pool, tiny_dense, batch):
    grid = pool.grid(trainer_config(), tiny_dense, updates_per_batch=4)
    with pytest.raises(RunError, match="batch = 6 sequences: cannot be divided into 4 equal shares"):
        grid.step(batch)


def test_weights_between_two_updates_are_of_no_version(pool, tiny_dense, batch):
    grid = pool.grid(trainer_config(data=2), tiny_dense, updates_per_batch=2)
    spoiled = [*batch[:3], replace(batch[3], advantage=1e308), *batch[4:]]
    with pytest.raises(RunError, match="this update changed no weight"):
        grid.step(spoiled)
    with pytest.raises(
        RunError, match=r"weights of rank 0 \(dp 0\) = part of the updates of step 0: of no version"
    ):
        grid.call("num_steps")


# ------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize("axes", [{}, {"tensor": 2, "pipeline": 2, "expert": 2, "max_tokens": 64}], ids=str)
def test_the_penalty_pulls_towards_the_reference_with_the_gradient_of_transformers(
    pool, tiny_moe, batch, axes, tmp_path
):
    """Advantage 0 leaves the penalty alone: the mean over response tokens of exp(r) - r - 1, r = reference - policy."""
    other = spoiled_copy(tiny_moe, tmp_path)
    batch = [replace(s, advantage=0.0) for s in batch]
    algorithm = AlgorithmConfig(name="reinforce", kl_coeff=0.5, kl_reference=other)
    grid = pool.grid(trainer_config(**axes), tiny_moe, algorithm=algorithm)
    before = grid.weights()
    expected_kl, gradients = hf_penalty(tiny_moe, other, batch)
    gradients = {name: 0.5 * gradient for name, gradient in gradients.items()}
    step = grid.step(batch)
    assert step.updates[0].kl == pytest.approx(expected_kl, rel=1e-4) and expected_kl > 1e-3
    assert step.loss == pytest.approx(0.5 * expected_kl, rel=1e-4)
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    assert step.grad_norm == pytest.approx(norm, rel=1e-4)
    moved = grid.weights()
    name = "model.layers.1.self_attn.o_proj.weight"
    downhill = -gradients[name] / (np.abs(gradients[name]) + 1e-2) * 1e-3  # Adam's first step, eps = 1e-2
    decay = 1 - 1e-3 * 0.01
    np.testing.assert_allclose(moved[name], before[name] * decay + downhill, atol=2e-6)


def spoiled_copy(source, target):
    """The same architecture with other weights."""
    shutil.copytree(source, target / "other")
    file = target / "other" / "model.safetensors"
    rng = np.random.default_rng(0)
    weights = {n: w + 0.01 * rng.standard_normal(w.shape).astype(w.dtype) for n, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return target / "other"


def hf_penalty(policy, reference, batch):
    models = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (policy, reference)]
    total, loss = sum(s.num_response_tokens for s in batch), torch.tensor(0.0)
    for s in batch:
        ids = torch.from_numpy(s.token_ids[None].astype(np.int64))
        logp, ref = (
            m(ids)
            .logits[0, s.num_prompt_tokens - 1 : -1]
            .log_softmax(-1)
            .gather(1, ids[0, s.num_prompt_tokens :, None])
            for m in models
        )
        r = ref.detach() - logp
        loss = loss + (r.exp() - r - 1).sum() / total
    loss.backward()
    return loss.item(), dict(unfused(models[0]))


def test_a_reference_equal_to_the_policy_costs_nothing_at_the_start(pool, tiny_moe, batch):
    algorithm = AlgorithmConfig(name="reinforce", kl_coeff=0.5)
    grid = pool.grid(trainer_config(), tiny_moe, algorithm=algorithm)
    plain = pool.grid(trainer_config(), tiny_moe, algorithm=AlgorithmConfig(name="reinforce"))
    expected = plain.step(batch)
    weights = plain.weights()
    grid = pool.grid(trainer_config(), tiny_moe, algorithm=algorithm)
    assert grid.step(batch).updates[0].kl == pytest.approx(0.0, abs=1e-9)
    assert largest_gap(grid.weights(), weights) < 1e-7
    assert grid.step(batch, 1).updates[0].kl > 0 and expected.updates[0].kl is None


def test_a_reference_of_another_architecture_is_refused(pool, tiny_moe, tiny_dense):
    algorithm = AlgorithmConfig(name="reinforce", kl_coeff=0.5, kl_reference=tiny_dense)
    with pytest.raises(
        ConfigError, match=r"algorithm\.kl_reference = .* describes another model than the policy's"
    ):
        pool.grid(trainer_config(), tiny_moe, algorithm=algorithm)


# ------------------------------------------------------------------------------------ tokens of an environment


@pytest.mark.parametrize(
    ("axes", "aggregation"),
    [({}, "seq_mean_token_sum"), ({"tensor": 2, "context": 2, "max_tokens": 64}, "token_mean")],
    ids=str,
)
def test_tokens_of_an_environment_count_for_nothing_as_in_float64(
    pool, tiny_moe, moderate_batch, axes, aggregation, tmp_path
):
    algorithm = AlgorithmConfig(
        name="vespo", aggregation=aggregation, kl_coeff=0.5, kl_reference=spoiled_copy(tiny_moe, tmp_path)
    )
    expected = in_float64(tiny_moe, algorithm, moderate_batch)
    grid = pool.grid(trainer_config(**axes), tiny_moe, algorithm=algorithm)
    largest = max(np.abs(g).max() for g in expected["gradients"].values())  # of the loss without its penalty
    assert largest_gap(grid.gradients(moderate_batch), expected["gradients"]) < 1e-5 * largest
    step = grid.step(moderate_batch)
    for scored, logp in zip(step.scored, expected["logp"], strict=True):  # of all tokens
        np.testing.assert_allclose(scored.logp, logp, atol=1e-5)
    np.testing.assert_allclose(step.log_w, expected["log_w"], atol=1e-5)
    np.testing.assert_allclose(step.coefficient, expected["phi"], rtol=1e-4)
    (update,) = step.updates
    assert update.num_tokens == expected["num_tokens"] == 22 + 10 + 15 + 11 + 1 + 27
    assert update.entropy == pytest.approx(expected["entropy"], rel=1e-5)
    assert update.kl == pytest.approx(expected["kl"], rel=1e-4) and update.kl > 1e-3
    assert update.loss == pytest.approx(expected["loss"], rel=1e-4)
    assert update.grad_norm == pytest.approx(expected["grad_norm"], rel=1e-4)


def in_float64(policy, algorithm, batch):
    """The same with transformers: every mean is over sampled tokens alone."""
    models = [
        AutoModelForCausalLM.from_pretrained(d, dtype=torch.float64, experts_implementation="eager")
        for d in (policy, algorithm.kl_reference)
    ]
    num_tokens = sum(int(trained(s).sum()) for s in batch)
    denominator = num_tokens if algorithm.resolved_aggregation == "token_mean" else len(batch)
    everything, log_w, phi, loss, kl, entropy = [], [], [], 0.0, 0.0, 0.0
    for s in batch:
        sampled, behavior = torch.from_numpy(trained(s)), torch.from_numpy(s.behavior_logp)
        ids = torch.from_numpy(s.token_ids[None].astype(np.int64))
        whole, other = (m(ids).logits[0, s.num_prompt_tokens - 1 : -1].log_softmax(-1) for m in models)
        logp, ref = (x.gather(1, ids[0, s.num_prompt_tokens :, None])[:, 0] for x in (whole, other))
        everything.append(logp.detach().numpy())
        log_w.append((logp.detach() - behavior)[sampled].sum().item())
        k, lam = (2, 3) if s.advantage >= 0 else (3, 2)
        phi.append(np.exp(k * log_w[-1] + lam * (1 - np.exp(log_w[-1]))))
        loss = loss - s.advantage * phi[-1] * logp[sampled].sum() / denominator
        r = ref.detach() - logp
        kl = kl + (r.exp() - r - 1)[sampled].sum()
        entropy -= float((whole.exp() * whole).sum(-1)[sampled].sum())
    loss.backward(retain_graph=True)
    gradients = {name: gradient.copy() for name, gradient in unfused(models[0])}
    penalty = algorithm.kl_coeff * kl / denominator
    penalty.backward()
    return {
        "num_tokens": num_tokens, "logp": everything, "log_w": log_w, "phi": phi, "entropy": entropy / num_tokens,
        "kl": kl.item() / num_tokens, "loss": loss.item() + penalty.item(), "gradients": gradients,
        "grad_norm": np.sqrt(sum(float(np.square(p.grad.numpy()).sum()) for p in models[0].parameters())),
    }  # fmt: skip


@pytest.mark.parametrize("axes", [{}, {"context": 2, "pipeline": 2, "max_tokens": 64}], ids=str)
def test_a_mask_that_hides_nothing_and_what_it_hides_change_no_bit(pool, tiny_moe, moderate_batch, axes):
    def results(batch):
        grid = pool.grid(trainer_config(**axes), tiny_moe, algorithm=VESPO)
        return grid.gradients(batch), grid.step(batch), grid.weights()

    def assert_equal(a, b):
        assert largest_gap(a[0], b[0]) == largest_gap(a[2], b[2]) == 0.0
        assert a[1].updates == b[1].updates
        np.testing.assert_array_equal(a[1].log_w, b[1].log_w)
        np.testing.assert_array_equal(a[1].coefficient, b[1].coefficient)

    maskless = [replace(s, sampled=None) for s in moderate_batch]
    assert_equal(
        results([replace(s, sampled=np.ones(s.num_response_tokens, bool)) for s in maskless]),
        results(maskless),
    )
    spoiled = [
        replace(s, behavior_logp=np.where(trained(s), s.behavior_logp, np.float32("nan")))
        for s in moderate_batch
    ]
    assert_equal(results(spoiled), results(moderate_batch))


def test_hidden_tokens_at_the_beginning_are_prompt_and_at_the_end_are_as_if_never_there(
    pool, tiny_moe, moderate_batch
):
    _, _, beginning, end, *_ = moderate_batch
    shorter = [
        replace(
            beginning,
            num_prompt_tokens=beginning.num_prompt_tokens + 2,
            behavior_logp=beginning.behavior_logp[2:],
            sampled=None,
        ),
        replace(end, token_ids=end.token_ids[:-4], behavior_logp=end.behavior_logp[:-4], sampled=None),
    ]
    grid = pool.grid(trainer_config(), tiny_moe, algorithm=VESPO)
    gradients = grid.gradients(shorter)
    largest = max(np.abs(g).max() for g in gradients.values())
    assert largest_gap(grid.gradients([beginning, end]), gradients) < 1e-5 * largest
    step = grid.step([beginning, end])
    expected = pool.grid(trainer_config(), tiny_moe, algorithm=VESPO).step(shorter)
    np.testing.assert_allclose(step.log_w, expected.log_w, atol=1e-5)
    np.testing.assert_allclose(step.coefficient, expected.coefficient, rtol=1e-4)
    for field in ("loss", "entropy", "grad_norm", "num_tokens"):
        assert getattr(step.updates[0], field) == pytest.approx(getattr(expected.updates[0], field), rel=1e-5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda num: np.zeros(num, bool), r"none of its \d+ response tokens was sampled"),
        (lambda num: np.ones(num - 1, bool), r"sampled must hold \d+ booleans, .* bool of shape \[\d+\]"),
        (lambda num: np.ones(num, np.int8), r"sampled must hold \d+ booleans, .* int8 of shape"),
    ],
)
def test_an_unusable_mask_is_refused_before_anything_runs(pool, tiny_moe, batch, mask, message):
    grid = pool.grid(trainer_config(), tiny_moe)
    broken = replace(batch[1], sampled=mask(batch[1].num_response_tokens))
    for method in (grid.step, grid.score):
        with pytest.raises(RunError, match=f"sequence prompt-1: {message}"):
            method([batch[0], broken])


# ------------------------------------------------------------------------------------ other numbers


def test_the_mass_of_the_most_likely_tokens_is_that_of_transformers(pool, tiny_moe, batch):
    cfg = trainer_config(tensor=2, pipeline=2).model_copy(update={"logprob_top_k": 5})
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    for s, scored in zip(batch, pool.grid(cfg, tiny_moe).score(batch), strict=True):
        logits = model(torch.from_numpy(s.token_ids[None].astype(np.int64))).logits[
            0, s.num_prompt_tokens - 1 : -1
        ]
        mass = logits.softmax(-1).topk(5).values.sum(-1).detach().numpy()
        np.testing.assert_allclose(scored.top_k_mass, mass, atol=1e-6)


def test_time_and_memory_are_told_by_phase(pool, tiny_dense, batch):
    algorithm = AlgorithmConfig(name="reinforce", kl_coeff=0.1)
    step = pool.grid(trainer_config(), tiny_dense, algorithm=algorithm, updates_per_batch=2).step(batch)
    phases = {"forward", "reference", "forward_backward", "optimizer"}
    assert step.time_s.keys() == step.memory_bytes.keys() == phases
    assert all(seconds > 0 for seconds in step.time_s.values())
    assert all(num_bytes > 50e6 for num_bytes in step.memory_bytes.values())


@pytest.mark.parametrize("routed", [(), (1, 4)])
@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_reports_the_experts_of_the_sequences_that_it_is_asked_for(
    pool, tiny_moe, batch, routed, updates
):
    cfg = trainer_config(tensor=2, pipeline=2, max_tokens=32)
    everything = pool.grid(trainer_config(), tiny_moe).score(batch)
    step = pool.grid(cfg, tiny_moe, updates_per_batch=updates).step(batch, routed=routed)
    for i, (got, whole) in enumerate(zip(step.scored, everything, strict=True)):
        if i in routed:
            np.testing.assert_array_equal(np.sort(got.experts), np.sort(whole.experts))
        else:
            assert got.experts is None


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
    assert "changed no weight" not in str(scoring.value)
    grid.call("poison", 1.0)  # what the tiny model has there
    assert largest_gap(grid.weights(), before) == 0.0
    assert np.isfinite(grid.step(batch, 8).loss)  # the ranks are still in step with one another


@pytest.mark.parametrize(
    ("advantage", "message"),
    [
        (1e308, r"sequence prompt-\d: its loss is not finite, at step 3"),
        (1e150, "gradient norm = (inf|nan) at update 0"),
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
    """The last of 8 inputs is the first context rank's fourth; the second one sees it through log W, without its token."""
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
    grid.call("poison_output", 0, 3)
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
        (
            {"moe_router_topk_scaling_factor": 2.0},
            "it would make the trainer another function than the engine",
        ),
        ({"moe_router_fusion": True}, "the fused router hides its choices"),
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


def test_a_megatron_field_reaches_the_model(tiny_moe):
    from megatron_vespo.trainer.hf_config import read_model_shape
    from megatron_vespo.trainer.model import transformer_config

    cfg = trainer_config().model_copy(update={"megatron": {"attention_softmax_in_fp32": False}})
    shape = read_model_shape(tiny_moe)
    assert transformer_config(trainer_config(), shape).attention_softmax_in_fp32
    assert not transformer_config(cfg, shape).attention_softmax_in_fp32


def test_deepep_by_name_is_refused_where_it_is_missing(pool, tiny_moe):
    cfg = trainer_config().model_copy(update={"token_dispatcher": "flex"})
    with pytest.raises(
        ConfigError, match=r"trainer\.token_dispatcher = 'flex': the package deep_ep is not installed"
    ):
        pool.grid(cfg, tiny_moe)


def test_transformer_engine_by_name_is_refused_on_cpu(pool, tiny_moe):
    cfg = trainer_config().model_copy(update={"implementation": "transformer_engine"})
    with pytest.raises(
        ConfigError, match=r"trainer\.implementation = 'transformer_engine': it needs device = 'cuda'"
    ):
        pool.grid(cfg, tiny_moe)
