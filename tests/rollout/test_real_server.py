"""A real SGLang server against transformers: sampling and scoring."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vespo.config import SamplingConfig
from megatron_vespo.rollout.client import SGLangEngine
from megatron_vespo.types import Prompt, TrainSequence, VersionSpan

PROMPT_TEXT = "12 plus 30 is what?"


@pytest.fixture(scope="module")
def reference(served_model):
    return AutoModelForCausalLM.from_pretrained(served_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompt(served_model):
    ids = AutoTokenizer.from_pretrained(served_model)(PROMPT_TEXT)["input_ids"]
    return Prompt(uid="p0", token_ids=np.array(ids, np.int32), text=PROMPT_TEXT, answer="42")


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
