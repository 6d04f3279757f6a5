"""A real SGLang server against transformers: sampling, scoring, and weights pushed while it works."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vespo.config import SamplingConfig
from megatron_vespo.rollout.client import SGLangEngine
from megatron_vespo.rollout.weight_sync import WeightSync
from megatron_vespo.types import Prompt, RunError, TrainSequence, VersionSpan

PROMPT_TEXT = "12 plus 30 is what?"


@pytest.fixture(scope="module")
def reference(served_model):
    return AutoModelForCausalLM.from_pretrained(served_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompt(served_model):
    ids = AutoTokenizer.from_pretrained(served_model)(PROMPT_TEXT)["input_ids"]
    return Prompt(uid="p0", token_ids=np.array(ids, np.int32), text=PROMPT_TEXT, answer="42")


@pytest.fixture
def new_weights(served_model, tmp_path):
    """Other weights of the same shape, under their Hugging Face names, and transformers' model of them."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(served_model / "model.safetensors")
    changed = {
        name: tensor + 0.3 * tensor.std().nan_to_num(0) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }
    for file in served_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return changed, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()


@pytest.fixture
def connection(sglang_server):
    sync = WeightSync.connect(
        sglang_server.url,
        sglang_server.model,
        backend="gloo",
        device=torch.device("cpu"),
        bucket_bytes=400_000,
        timeout_s=30,
    )
    yield sync
    sync.close()


def ask(server, config, work, *, temperature=1.0, limit=16):
    """Run `work(engine)` with a fresh engine client."""

    async def main():
        sampling = SamplingConfig(temperature=temperature, max_response_tokens=limit)
        engine = SGLangEngine(server.url, server.model, config, sampling, server.death_report)
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def logp_of(model, ids, num_prompt, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0]
    logp = torch.log_softmax(logits.double() / temperature, -1)
    return logp[range(num_prompt - 1, len(ids) - 1), ids[num_prompt:].astype(np.int64)].numpy()


def experts_of(model, ids):
    """[N - 1, L, K] sorted, from transformers' router logits."""
    with torch.no_grad():
        out = model(torch.tensor(ids[None].astype(np.int64)), output_router_logits=True)
    chosen = torch.stack([layer.topk(2, -1).indices for layer in out.router_logits], 1)
    return np.sort(chosen.numpy()[:-1], -1)


def whole(prompt, response):
    return np.concatenate([prompt.token_ids, response.token_ids])


def sequence(prompt, response):
    return TrainSequence(
        uid=prompt.uid, token_ids=whole(prompt, response), num_prompt_tokens=len(prompt.token_ids)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_those_of_transformers(
    sglang_server, server_rollout_config, reference, prompt, temperature
):
    responses = ask(
        sglang_server, server_rollout_config, lambda e: e.sample(prompt, 4), temperature=temperature
    )
    assert len(responses) == 4
    assert len({tuple(r.token_ids) for r in responses}) == 4
    for response in responses:
        ids = whole(prompt, response)
        expected = logp_of(reference, ids, len(prompt.token_ids), temperature)
        assert np.abs(response.behavior_logp - expected).max() < 1e-4
        assert response.spans == (VersionSpan(version=0, start=0, end=len(response.token_ids)),)
        assert response.experts is not None
        assert (np.sort(response.experts, -1) == experts_of(reference, ids)).all()


def test_a_response_ends_at_the_end_of_turn(sglang_server, server_rollout_config, prompt):
    """264 nearly equal tokens, 8 x 600 samples: 18 end-of-turns are expected, none has probability 1e-8."""
    responses = ask(sglang_server, server_rollout_config, lambda e: e.sample(prompt, 8), limit=600)
    stopped = [r for r in responses if r.finish_reason == "stop"]
    assert stopped
    for response in responses:
        ends = np.flatnonzero(response.token_ids == 260)
        assert ends.tolist() == ([len(response.token_ids) - 1] if response.finish_reason == "stop" else [])
        assert "<|end|>" not in response.text


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scoring_agrees_with_sampling(sglang_server, server_rollout_config, reference, prompt, temperature):
    async def work(engine):
        responses = await engine.sample(prompt, 2)
        return responses, await engine.score([sequence(prompt, r) for r in responses])

    responses, scored = ask(sglang_server, server_rollout_config, work, temperature=temperature)
    for response, score in zip(responses, scored, strict=True):
        expected = logp_of(reference, whole(prompt, response), len(prompt.token_ids), temperature)
        assert np.abs(score.logp - expected).max() < 1e-4
        assert np.abs(score.logp - response.behavior_logp).max() < 1e-4
        assert (np.sort(score.experts, -1) == np.sort(response.experts, -1)).all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_token_of_the_vocabulary_can_be_scored(
    sglang_server, server_rollout_config, reference, temperature
):
    """SGLang reports the last id under another name."""
    ids = np.arange(264, dtype=np.int32)
    given = TrainSequence(uid="all", token_ids=ids, num_prompt_tokens=1)
    (score,) = ask(sglang_server, server_rollout_config, lambda e: e.score([given]), temperature=temperature)
    assert np.abs(score.logp - logp_of(reference, ids, 1, temperature)).max() < 1e-4


def test_a_sequence_as_long_as_the_context_is_served_whole(sglang_server, server_rollout_config, prompt):
    room = server_rollout_config.context_length - len(prompt.token_ids)
    full = np.full(server_rollout_config.context_length, 65, np.int32)
    nearly = replace(prompt, token_ids=full[: -room // 100])

    async def work(engine):
        (scored,) = await engine.score(
            [TrainSequence(uid="full", token_ids=full, num_prompt_tokens=len(prompt.token_ids))]
        )
        return scored, await engine.sample(nearly, 1)

    limit = server_rollout_config.context_length - len(nearly.token_ids)
    scored, (response,) = ask(sglang_server, server_rollout_config, work, limit=limit)
    assert len(scored.logp) == room
    assert response.finish_reason == "stop" or len(response.token_ids) == limit


def test_a_push_changes_what_the_server_computes(
    sglang_server, server_rollout_config, reference, prompt, new_weights, connection
):
    tensors, changed = new_weights
    ids = whole(prompt, ask(sglang_server, server_rollout_config, lambda e: e.sample(prompt, 1))[0])
    given = TrainSequence(uid="canary", token_ids=ids, num_prompt_tokens=len(prompt.token_ids))

    def score():
        return ask(sglang_server, server_rollout_config, lambda e: e.score([given]))[0]

    old, new = (logp_of(model, ids, given.num_prompt_tokens) for model in (reference, changed))
    assert np.abs(old - new).max() > 1e-2
    assert np.abs(score().logp - old).max() < 1e-4

    num_bytes, time_s = connection.push(iter(tensors.items()), version=1)

    assert num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert time_s["gather"] + time_s["transfer"] <= time_s["total"] < 30
    after = score()
    assert np.abs(after.logp - new).max() < 1e-4
    assert (np.sort(after.experts, -1) == experts_of(changed, ids)).all()
    assert ask(sglang_server, server_rollout_config, lambda e: e.weight_version()) == 1
    # The prompt was cached under the old weights: nothing of it may be served now.
    (response,) = ask(sglang_server, server_rollout_config, lambda e: e.sample(prompt, 1))
    assert (
        np.abs(
            response.behavior_logp - logp_of(changed, whole(prompt, response), len(prompt.token_ids))
        ).max()
        < 1e-4
    )
    assert (np.sort(response.experts, -1) == experts_of(changed, whole(prompt, response))).all()


def test_bfloat16_and_float32_share_a_push(
    sglang_server, server_rollout_config, prompt, new_weights, connection
):
    tensors, changed = new_weights
    mixed = {n: t if "gate.weight" in n or "norm" in n else t.bfloat16() for n, t in tensors.items()}
    assert {t.dtype for t in mixed.values()} == {torch.float32, torch.bfloat16}
    connection.push(iter(mixed.items()), version=1)
    (response,) = ask(sglang_server, server_rollout_config, lambda e: e.sample(prompt, 1))
    rounded = {n: p.bfloat16().float() if p.dim() > 1 and "gate.weight" not in n else p
               for n, p in changed.state_dict().items()}  # fmt: skip
    changed.load_state_dict(rounded)
    assert (
        np.abs(
            response.behavior_logp - logp_of(changed, whole(prompt, response), len(prompt.token_ids))
        ).max()
        < 1e-4
    )


def test_a_response_across_a_push_carries_two_versions(
    sglang_server, server_rollout_config, reference, prompt, new_weights, connection
):
    tensors, changed = new_weights
    num_prompt = len(prompt.token_ids)

    async def work(engine):
        sampling = asyncio.create_task(engine.sample(prompt, 32))  # of about 264 tokens: some are under way
        await asyncio.sleep(0.5)
        await asyncio.to_thread(connection.push, iter(tensors.items()), 1)
        return await sampling

    responses = ask(sglang_server, server_rollout_config, work, limit=900)
    assert {r.spans[-1].version for r in responses} <= {0, 1}
    spanning = [r for r in responses if len(r.spans) == 2]
    assert spanning
    for response in spanning:
        first, second = response.spans
        assert (first.version, second.version, second.end) == (0, 1, len(response.token_ids))
        ids = whole(prompt, response)
        old, new = (logp_of(model, ids, num_prompt) for model in (reference, changed))
        cut = first.end
        assert np.abs(response.behavior_logp[:cut] - old[:cut]).max() < 1e-4
        # No cached key of the old weights may be left: these are pure new weights.
        assert np.abs(response.behavior_logp[cut:] - new[cut:]).max() < 1e-4


@pytest.mark.parametrize("fault", ["unknown name", "wrong shape", "missing tensor", "given twice"])
def test_a_wrong_push_is_refused_and_generation_does_not_go_on(sglang_server, new_weights, connection, fault):
    tensors, _ = new_weights
    named = list(tensors.items())
    if fault == "unknown name":
        named[5] = ("model.nonsense.weight", named[5][1])
    elif fault == "wrong shape":
        named[5] = (named[5][0], named[5][1][:-1])
    elif fault == "missing tensor":
        del named[-1]
    else:
        named.insert(6, named[5])
    began = time.monotonic()
    with pytest.raises(RunError, match="mend the export"):
        connection.push(iter(named), version=1)
    assert time.monotonic() - began < 10
    with pytest.raises(RunError, match="half updated"):
        connection.push(iter(tensors.items()), version=1)


def test_the_trainers_own_process_group_is_left_alone(sglang_server, new_weights, tmp_path):
    """Connect, push and close twice beside a default group: the second connection finds nothing of the first."""
    tensors, _ = new_weights
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for version in (1, 2):
            sync = WeightSync.connect(
                sglang_server.url,
                sglang_server.model,
                backend="gloo",
                device=torch.device("cpu"),
                bucket_bytes=10**9,
                timeout_s=30,
            )
            sync.push(iter(tensors.items()), version)
            sync.close()
        counted = torch.ones(1)
        dist.all_reduce(counted)
        assert counted.item() == 1
    finally:
        dist.destroy_process_group()


def test_a_bucket_that_the_server_refuses_unread_leaves_nobody_waiting(connection):
    """The server answers 400 before it receives; 64 MB do not fit into socket buffers, so the sender would hang."""
    flat = torch.zeros(64 * 1024**2, dtype=torch.uint8)
    nonsense = {"names": ["model.norm.weight"], "dtypes": ["float33"], "shapes": [[64]]}
    connection._begin()
    began = time.monotonic()
    with pytest.raises(RunError, match=r"was not taken.*float33"):
        connection._group.broadcast(connection._control, flat, nonsense)
    connection.close()
    assert time.monotonic() - began < 10
