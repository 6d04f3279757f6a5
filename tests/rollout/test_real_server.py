"""A fleet over a real SGLang server, against transformers: sampling, scoring, interruption, and hanging."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import aiohttp
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vespo.rollout.client import EngineClient, open_pool
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.lifecycle import State
from megatron_vespo.rollout.server import External
from megatron_vespo.types import Prompt, RunError, Sampling, TrainSequence, VersionSpan

PROMPT_TEXT = "12 plus 30 is what?"
NAME = "engine 0"


@pytest.fixture(scope="module")
def reference(served_model):
    return AutoModelForCausalLM.from_pretrained(served_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(served_model):
    return AutoTokenizer.from_pretrained(served_model)


@pytest.fixture(scope="module")
def prompt(tokenizer):
    ids = tokenizer(PROMPT_TEXT)["input_ids"]
    return Prompt(uid="p0", token_ids=np.array(ids, np.int32), text=PROMPT_TEXT, answer="42")


@pytest.fixture(scope="module")
def other_model(served_model, tmp_path_factory):
    """Other weights of the same shape: their directory, and transformers' model of them."""
    directory = tmp_path_factory.mktemp("other")
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(served_model / "model.safetensors")
    changed = {
        name: tensor + 0.3 * tensor.std().nan_to_num(0) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }
    for file in served_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
    return directory, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def ask(server, config, work, *, temperature=1.0, **fields):
    """Run `work(fleet)` with a fleet of the one server, which serves version 0."""

    async def main():
        cfg, told = config.model_copy(update=fields), []
        engine = External(NAME, server.url, cfg.start_timeout_s)
        async with Fleet(cfg, server.model, [engine], told.append, temperature=temperature) as fleet:
            await fleet.to_update(0)
            assert fleet.confirm(NAME, 0)
            return await work(fleet)

    return asyncio.run(main())


async def post(server, path, payload):
    async with (
        aiohttp.ClientSession() as session,
        session.post(server.url + path, json=payload) as answer,
    ):
        assert answer.status == 200, await answer.text()


async def push_from_disk(fleet, server, directory, mode, version=1):
    """A weight push in the given mode, by the simplest transport."""
    await fleet.to_update(version)
    with fleet.updating([NAME]):
        await post(server, "/pause_generation", {"mode": mode})
        fields = {"model_path": str(directory), "weight_version": str(version)}
        await post(server, "/update_weights_from_disk", {**fields, "flush_cache": mode != "in_place"})
        await post(server, "/continue_generation", {})
        assert fleet.confirm(NAME, version)


def sampling(limit=16, temperature=1.0):
    return Sampling(temperature=temperature, max_tokens=limit)


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
        sglang_server,
        server_rollout_config,
        lambda fleet: fleet.sample(prompt, 4, sampling(temperature=temperature)),
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
        assert response.engine == NAME


def test_a_response_ends_at_the_end_of_turn(sglang_server, server_rollout_config, prompt):
    """264 nearly equal tokens, 8 x 600 samples: 18 end-of-turns are expected, none has probability 1e-8."""
    responses = ask(
        sglang_server, server_rollout_config, lambda fleet: fleet.sample(prompt, 8, sampling(600))
    )
    stopped = [r for r in responses if r.finish_reason == "stop"]
    assert stopped
    for response in responses:
        ends = np.flatnonzero(response.token_ids == 260)
        assert ends.tolist() == ([len(response.token_ids) - 1] if response.finish_reason == "stop" else [])
        assert "<|end|>" not in response.text


def test_top_p_leaves_only_the_most_likely_tokens(sglang_server, server_rollout_config, reference, prompt):
    narrow = Sampling(temperature=1.0, max_tokens=8, top_p=1e-6)
    (response,) = ask(sglang_server, server_rollout_config, lambda fleet: fleet.sample(prompt, 1, narrow))
    with torch.no_grad():
        logits = reference(torch.tensor(whole(prompt, response)[None].astype(np.int64))).logits[0]
    greedy = logits[len(prompt.token_ids) - 1 : -1].argmax(-1).numpy()
    assert response.token_ids.tolist() == greedy.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scoring_agrees_with_sampling(sglang_server, server_rollout_config, reference, prompt, temperature):
    async def work(fleet):
        responses = await fleet.sample(prompt, 2, sampling(temperature=temperature))
        return responses, await fleet.score([sequence(prompt, r) for r in responses])

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
    (score,) = ask(
        sglang_server, server_rollout_config, lambda fleet: fleet.score([given]), temperature=temperature
    )
    assert np.abs(score.logp - logp_of(reference, ids, 1, temperature)).max() < 1e-4


def test_a_sequence_as_long_as_the_context_is_served_whole(sglang_server, server_rollout_config, prompt):
    room = server_rollout_config.context_length - len(prompt.token_ids)
    full = np.full(server_rollout_config.context_length, 65, np.int32)
    nearly = replace(prompt, token_ids=full[: -room // 100])
    limit = server_rollout_config.context_length - len(nearly.token_ids)

    async def work(fleet):
        (scored,) = await fleet.score(
            [TrainSequence(uid="full", token_ids=full, num_prompt_tokens=len(prompt.token_ids))]
        )
        return scored, await fleet.sample(nearly, 1, sampling(limit))

    scored, (response,) = ask(sglang_server, server_rollout_config, work)
    assert len(scored.logp) == room
    assert response.finish_reason == "stop" or len(response.token_ids) == limit


def test_a_long_prompt_is_computed_once_for_all_its_responses(
    sglang_server, server_rollout_config, reference, prompt
):
    rng = np.random.default_rng(0)
    long = replace(prompt, token_ids=rng.integers(0, 256, 300).astype(np.int32))

    async def computed():
        async with (
            aiohttp.ClientSession() as session,
            session.get(sglang_server.url + "/v1/loads") as answer,
        ):
            return (await answer.json())["loads"][0]["total_prefill_uncached_tokens"]

    async def work(fleet):
        before = await computed()
        responses = await fleet.sample(long, 8, sampling(4))
        return responses, await computed() - before

    responses, num_computed = ask(sglang_server, server_rollout_config, work)
    assert 300 <= num_computed < 400  # 2400 without sharing
    for response in responses:
        ids = whole(long, response)
        assert np.abs(response.behavior_logp - logp_of(reference, ids, 300)).max() < 1e-4
        assert (np.sort(response.experts, -1) == experts_of(reference, ids)).all()


def across_a_push(server, config, prompt, directory, mode):
    """Responses of about 264 tokens, some of which are under way when other weights are pushed as version 1."""

    async def work(fleet):
        sampled = asyncio.create_task(fleet.sample(prompt, 16, sampling(900)))
        async with open_pool() as pool:
            engine = EngineClient(server.url, pool)
            while (load := await engine.load()) is None or load.running < 16:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert not sampled.done()
        await push_from_disk(fleet, server, directory, mode)
        return await sampled

    responses = ask(server, config, work)
    assert len(responses) == len({tuple(r.token_ids) for r in responses}) == 16
    spanning = [r for r in responses if len(r.spans) == 2]
    assert spanning
    for response in spanning:
        first, second = response.spans
        assert (first.version, second.version, second.end) == (0, 1, len(response.token_ids))
    return spanning


def test_an_aborted_response_is_resumed_with_exact_logprobs_versions_and_first_pass_experts(
    sglang_server, server_rollout_config, reference, prompt, other_model, tokenizer
):
    directory, changed = other_model
    for response in across_a_push(sglang_server, server_rollout_config, prompt, directory, "abort"):
        ids, num_prompt, cut = whole(prompt, response), len(prompt.token_ids), response.spans[0].end
        old, new = (logp_of(model, ids, num_prompt) for model in (reference, changed))
        assert np.abs(old - new).max() > 1e-2
        assert np.abs(response.behavior_logp[:cut] - old[:cut]).max() < 1e-4
        assert np.abs(response.behavior_logp[cut:] - new[cut:]).max() < 1e-4
        # The last token of version 0 was first processed under version 1.
        rows, experts = num_prompt + cut - 1, np.sort(response.experts, -1)
        assert (experts[:rows] == experts_of(reference, ids)[:rows]).all()
        assert (experts[rows:] == experts_of(changed, ids)[rows:]).all()
        assert response.num_resumed == 1
        ended = response.finish_reason == "stop"
        kept = response.token_ids[: -1 if ended else None]
        assert response.text == tokenizer.decode(kept, skip_special_tokens=True)


def test_a_retracted_response_has_exact_logprobs_and_the_experts_of_its_last_pass(
    sglang_server, server_rollout_config, reference, prompt, other_model
):
    directory, changed = other_model
    for response in across_a_push(sglang_server, server_rollout_config, prompt, directory, "retract"):
        ids, num_prompt, cut = whole(prompt, response), len(prompt.token_ids), response.spans[0].end
        old, new = (logp_of(model, ids, num_prompt) for model in (reference, changed))
        assert np.abs(response.behavior_logp[:cut] - old[:cut]).max() < 1e-4
        # No cached key of the old weights may be left: these are pure new weights.
        assert np.abs(response.behavior_logp[cut:] - new[cut:]).max() < 1e-4
        assert (np.sort(response.experts, -1) == experts_of(changed, ids)).all()
        assert response.num_resumed == 0


def test_a_response_that_keeps_its_cache_mixes_both_weights_and_says_where(
    sglang_server, server_rollout_config, reference, prompt, other_model
):
    directory, changed = other_model
    for response in across_a_push(sglang_server, server_rollout_config, prompt, directory, "in_place"):
        ids, num_prompt, cut = whole(prompt, response), len(prompt.token_ids), response.spans[0].end
        old, new = (logp_of(model, ids, num_prompt) for model in (reference, changed))
        assert np.abs(response.behavior_logp[:cut] - old[:cut]).max() < 1e-4
        assert np.abs(response.behavior_logp[cut:] - old[cut:]).max() > 1e-3
        assert np.abs(response.behavior_logp[cut:] - new[cut:]).max() > 1e-3
        rows = num_prompt + cut - 1
        assert (np.sort(response.experts, -1)[:rows] == experts_of(reference, ids)[:rows]).all()


def test_a_cancelled_sampling_frees_the_server(sglang_server, server_rollout_config, prompt):
    async def work(fleet):
        async with open_pool() as pool:
            engine = EngineClient(sglang_server.url, pool)
            sampled = asyncio.create_task(fleet.sample(prompt, 16, sampling(900)))
            while (load := await engine.load()) is None or load.running < 16:
                await asyncio.sleep(0.01)
            sampled.cancel()
            async with asyncio.timeout(3):  # it would notice the lost connection by itself after 4
                while (load := await engine.load()) is None or load.running:
                    await asyncio.sleep(0.01)

    ask(sglang_server, server_rollout_config, work)


def test_a_refused_request_says_what_the_server_said(sglang_server, server_rollout_config, prompt):
    long = replace(prompt, token_ids=np.full(2000, 65, np.int32))
    with pytest.raises(RunError, match=r"(?s)prompt 'p0' = refused: .*HTTP 400: .*2000"):
        ask(sglang_server, server_rollout_config, lambda fleet: fleet.sample(long, 1, sampling()))


def test_a_scheduler_that_hangs_behind_a_living_http_server_is_found(
    sglang_server, server_rollout_config, prompt
):
    schedulers = [
        p.pid
        for p in psutil.Process(sglang_server.pid).children(recursive=True)
        if "scheduler" in " ".join(p.cmdline())
    ]
    assert schedulers

    async def work(fleet):
        (engine,) = fleet.members
        sampled = asyncio.create_task(fleet.sample(prompt, 8, sampling(900)))
        while not engine.num_under_way:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        try:
            for pid in schedulers:
                os.kill(pid, signal.SIGSTOP)
            async with asyncio.timeout(10):
                while engine.state is State.SERVING:
                    await asyncio.sleep(0.05)
            assert "it hangs: with 8 sequences" in engine.why_lost
        finally:
            for pid in schedulers:
                os.kill(pid, signal.SIGCONT)
        async with asyncio.timeout(40):
            await fleet.newcomer()
        await fleet.to_update(0)
        fleet.confirm(NAME, 0)
        return await sampled

    assert len(ask(sglang_server, server_rollout_config, work, stall_timeout_s=2.0)) == 8
