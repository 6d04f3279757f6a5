"""The small policy: its task, its sampler, that off-policy methods differ off policy only, and the collapse itself."""

import copy
import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from megatron_vespo.config import ConfigError, Method
from tools.staleness import toy
from tools.staleness.outcomes import has_collapsed

CELL = {
    "level": "toy",
    "algorithm": "VESPO",
    "overrides": {"name": "vespo"},
    "seed": 3,
    "learning_rate": 1e-3,
    "N": 2,
    "num_updates": 4,
    "warm_updates": 30,
    "shortest": 3,
    "longest": 4,
    "decisions": 2,
}


def settings(**changes) -> toy.Settings:
    return toy.Settings.model_validate(CELL | changes)


def problem(**changes) -> toy.Problem:
    return settings(**changes).problem


def test_the_same_cell_gives_the_same_numbers():
    noisy = CELL | {"policy": "moe", "router_noise": 0.2, "engine_noise": 0.1, "staleness": 1}
    first, again = toy.run(noisy), toy.run(noisy)
    torch.randn(3)  # the global generator plays no role
    assert first["history"] == again["history"] and first["final"] == again["final"]
    assert toy.run(noisy | {"seed": 4})["history"] != first["history"]
    assert [entry["update"] for entry in first["history"]] == [0, 2, 4]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"lerning_rate": 1e-3}, "lerning_rate: Extra inputs"),
        ({"overrides": {"name": "ppo"}}, "name"),
        ({"overrides": {"name": "vespo", "gspo.clip": [0.1, 0.1]}}, "not used with name = 'vespo'"),
        ({"router_noise": 0.1}, "policy = 'dense' has no router"),
    ],
)
def test_settings_that_nobody_knows_are_refused(changes, complaint):
    toy.check(CELL)
    with pytest.raises(ConfigError, match=complaint):
        toy.check(CELL | changes)


def test_only_the_whole_right_string_that_ends_is_rewarded():
    task = toy.Task(problem(longest=3))
    right = task.target[:1].clone()
    assert right.tolist()[0][3:] == [toy.EOS]
    wrong = right.clone()
    wrong[0, 1] = (right[0, 1] + 1) % toy.ALPHABET
    endless = right.clone()
    endless[0, 3] = 0
    early = right.clone()
    early[0, 2] = toy.EOS
    prompt = torch.zeros(1, dtype=torch.int64)
    assert task.reward(prompt, right, torch.tensor([4])).tolist() == [1]
    for tokens, length in ((wrong, 4), (endless, 4), (early, 3), (task.target[1:2], 4)):
        assert task.reward(prompt, tokens, torch.tensor([length])).tolist() == [0]


def test_a_free_tail_is_rewarded_whatever_it_says_if_it_ends():
    task = toy.Task(problem(longest=3, tail=1.0))
    tokens = torch.cat([task.target[:1, :3], torch.tensor([[5, 7, toy.EOS, 0]])], 1)
    prompt = torch.zeros(1, dtype=torch.int64)
    assert task.reward(prompt, tokens, torch.tensor([6])).tolist() == [1]
    assert task.reward(prompt, tokens.roll(1, 1), torch.tensor([7])).tolist() == [0]
    assert task.reward(prompt, tokens, torch.tensor([5])).tolist() == [0]  # cut off in the tail


def test_demonstrations_are_as_right_as_the_warm_start_is_to_be():
    task = toy.Task(problem(accuracy=0.7, tail=2.0))
    prompt_B, token_BT, length_B = task.demonstrations(4000, torch.Generator().manual_seed(0))
    share = task.reward(prompt_B, token_BT, length_B).mean().item()
    # 2 decisions, and 3 to 4 letters, EOS and a truncated tail that may slip: two in a thousand each
    assert share == pytest.approx(0.7**2 * 0.998**4.5, abs=4 * math.sqrt(0.25 / 4000))
    free = (length_B - 1 - task.length[prompt_B]).float()
    assert free.min() >= 0 and free.max() == 7 and 1.5 < free.mean() < 2.0  # mean 2, cut at 6 or 7


@pytest.mark.parametrize("policy", ["dense", "moe"])
def test_contexts_give_what_the_plain_network_gives(policy):
    net = toy.warm_start(problem(policy=policy), 0)
    prompt, position, previous = torch.tensor([1, 7, 1]), torch.tensor([0, 4, 0]), torch.tensor([17, 3, 17])
    x = torch.cat(
        [table[i] for table, i in zip(net.embeddings, (prompt, position, previous), strict=True)], 1
    )
    h = net.first(x)
    if policy == "dense":
        z = net.dense(F.silu(h))
    else:
        z = h[:, :48].clone()
        for row in range(3):
            gates, chosen = h[row, 48:56].topk(2)
            for gate, e in zip(gates.softmax(0), chosen.tolist(), strict=True):
                z[row] += gate * (F.silu(h[row, 56 + 48 * e : 104 + 48 * e]) @ net.second[e])
    token = torch.tensor([2, 16, 2])
    expected = F.log_softmax(net.out(F.silu(z)), -1)[range(3), token]
    torch.testing.assert_close(net.log_probs(net.context(prompt, position, previous), token), expected)


@pytest.mark.parametrize("policy", ["dense", "moe"])
def test_the_sampler_reports_what_the_trainer_computes_unless_it_is_noisy(policy):
    net = toy.warm_start(problem(policy=policy), 0)
    prompt_B = torch.arange(8).repeat_interleave(16)

    def gap(**noise) -> float:
        responses = toy.sample(net, prompt_B, torch.Generator().manual_seed(1), **noise)
        mask = responses.mask_BT
        scored = net.log_probs(responses.context_BT[mask], responses.token_BT[mask])
        return (scored - responses.logp_BT[mask]).square().mean().sqrt().item()

    assert gap() < 1e-5
    assert 0.02 < gap(engine_noise=0.1) < 0.2  # less where the policy is sure
    if policy == "moe":
        assert gap(router_noise=1.0) > 0.02


def test_samples_have_the_frequencies_of_the_policy():
    net = toy.warm_start(problem(warm_updates=1), 0)  # nearly uniform
    num = 20_000
    responses = toy.sample(net, torch.zeros(num, dtype=torch.int64), torch.Generator().manual_seed(1))
    start = net.context(torch.tensor([0]), 0, torch.tensor([toy.BOS]))
    p = F.softmax(net.logits(net.parts(start)), -1)[0].detach()
    counts = torch.bincount(responses.token_BT[:, 0], minlength=toy.ALPHABET + 1)
    assert ((counts - num * p).abs() < 4.5 * (num * p * (1 - p)).sqrt()).all()
    ends = responses.token_BT[range(num), responses.length_B - 1] == toy.EOS
    assert (ends | (responses.length_B == 5)).all() and responses.length_B.min() == 1


def gradient(name: str, aggregation: str = "token_mean") -> torch.Tensor:
    training = toy.Training(settings(overrides={"name": name, "aggregation": aggregation}))
    batch = training.rollout()
    before = copy.deepcopy(training.policy)
    training.step = lambda loss, rate_factor: loss.backward()  # the gradient as it is, before Adam
    training.update(batch, batch.share(0))
    assert all(map(torch.equal, before.parameters(), training.policy.parameters()))
    return torch.cat([p.grad.flatten() for p in training.policy.parameters()])


@pytest.mark.parametrize("name", sorted(set(get_args(Method)) - {"reinforce"}))
def test_on_policy_every_method_has_the_same_gradient(name):
    expected = gradient("reinforce")
    assert expected.norm() > 0.01
    torch.testing.assert_close(gradient(name), expected, rtol=1e-3, atol=1e-5)


def test_updates_see_the_ratios_that_their_reference_gives():
    training = toy.Training(settings(engine_noise=0.3))
    batch = training.rollout()
    log_w_B, _ = training.update(batch, batch.share(0))
    assert log_w_B.std() > 0.1  # the engine's noise is in W
    proximal = toy.Training(settings(engine_noise=0.3, overrides={"name": "vespo", "reference": "proximal"}))
    batch = proximal.rollout()
    log_w_B, coefficient_B = proximal.update(batch, batch.share(0))
    assert log_w_B.abs().max() < 1e-4  # and here it is not
    torch.testing.assert_close(coefficient_B, torch.ones_like(coefficient_B), rtol=1e-3, atol=0)
    assert batch.engine_variance > 0.01


def test_stale_batches_are_sampled_by_the_weights_of_s_batches_ago():
    training = toy.Training(settings(staleness=2, num_updates=100))
    starts = []
    for _ in range(4):
        starts.append(copy.deepcopy(training.policy))
        training.train(training.rollout())
    sampler = list(training.samplers[0].parameters())
    assert all(map(torch.equal, sampler, starts[1].parameters()))  # batch 3 by the weights of batch 1
    assert not all(map(torch.equal, sampler, starts[3].parameters()))


def test_a_spent_batch_is_left():
    eager = {"learning_rate": 0.1, "N": 4, "num_updates": 4}
    guarded = toy.Training(settings(**eager, overrides={"name": "vespo", "min_living_weight": 0.9}))
    guarded.train(guarded.rollout())
    assert 0 < guarded.num_updates < 4


def test_sapo_collapses_within_two_batches_of_64_updates_and_vespo_does_not():
    """The study's result in one seed; docs/staleness has the tables."""
    names = ("level", "algorithm", "learning_rate")
    cell = {key: CELL[key] for key in names} | {"seed": 0, "N": 64, "num_updates": 128}
    vespo = toy.run(cell | {"overrides": {"name": "vespo"}})
    sapo = toy.run(cell | {"overrides": {"name": "sapo"}})
    assert 0.1 < vespo["start"] == sapo["start"] < 0.3
    assert vespo["final"] > 0.85
    assert has_collapsed(sapo) and sapo["final"] < 0.2
