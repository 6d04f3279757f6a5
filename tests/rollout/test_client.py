"""Answers of the engine are checked on arrival, and failures are told apart; canned answers and a canned server."""

from __future__ import annotations

import asyncio
import base64
import copy
import json

import numpy as np
import pytest
from aiohttp import web

from megatron_vespo.config import RolloutConfig, SamplingConfig
from megatron_vespo.rollout import client
from megatron_vespo.rollout.client import SGLangEngine, parse_response, parse_scored
from megatron_vespo.rollout.model import ModelFacts
from megatron_vespo.types import Prompt, RunError, TrainSequence, VersionSpan

FACTS = ModelFacts(
    vocab_size=264,
    max_positions=1024,
    num_layers=3,
    router_layers=(0, 2),
    num_experts=8,
    experts_per_token=2,
    stop_token_ids=(260,),
)
PROMPT_IDS = [1, 2]

# 2 + 3 tokens: rows of 4 tokens, 3 layers of which the middle one is dense and sends zeros, 2 experts.
EXPERTS = np.array([[[p, p + 1], [0, 0], [7, p]] for p in range(4)], "<i4")


def encoded(experts) -> str:
    return base64.b64encode(np.ascontiguousarray(experts, "<i4").tobytes()).decode()


ANSWER = {
    "text": "ab",
    "output_ids": [65, 66, 260],
    "meta_info": {
        "prompt_tokens": 2,
        "finish_reason": {"type": "stop", "matched": 260},
        "weight_version": "4",
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}],
        "output_token_logprobs": [[-0.5, 65, None], [-1.5, 66, None], [-2.5, 260, None]],
        "routed_experts": encoded(EXPERTS),
    },
}


def changed(**meta):
    answer = copy.deepcopy(ANSWER)
    answer["meta_info"] |= meta
    return answer


def parse(answer, *, limit=3, record=True):
    return parse_response(answer, 2, limit, FACTS, record, "http://e, prompt 'p'")


def test_a_good_answer_becomes_a_response():
    response = parse(ANSWER)
    assert response.token_ids.tolist() == [65, 66, 260]
    assert response.behavior_logp.tolist() == [-0.5, -1.5, -2.5]
    assert response.spans == (VersionSpan(version=3, start=0, end=1), VersionSpan(version=4, start=1, end=3))
    assert response.versions.tolist() == [3, 4, 4]
    assert response.finish_reason == "stop"
    assert response.text == "ab"
    assert response.experts.dtype == np.int16
    assert response.experts.tolist() == [[[p, p + 1], [7, p]] for p in range(4)]
    assert parse(ANSWER, record=False).experts is None


def test_an_empty_span_of_a_request_that_had_no_token_yet_is_dropped():
    spans = [{"version": "3", "start": 0, "end": 0}, {"version": "4", "start": 0, "end": 3}]
    assert parse(changed(weight_versions=spans)).spans == (VersionSpan(version=4, start=0, end=3),)


TWICE = EXPERTS.copy()
TWICE[2, 2] = 5
FAR = EXPERTS.copy()
FAR[0, 0, 0] = 8


@pytest.mark.parametrize(
    ("meta", "complaint"),
    [
        ({"prompt_tokens": 3}, "a prompt of 3 tokens: expected 2"),
        ({"output_token_logprobs": ANSWER["meta_info"]["output_token_logprobs"][:2]}, "2 log-probs: expected one for each of 3"),
        ({"output_token_logprobs": [[-1, 65], [-1, 67], [-1, 260]]}, "log-probs"),
        ({"output_token_logprobs": [[-1, 65], [float("nan"), 66], [-1, 260]]}, r"log-prob \[nan\] of token \[1\]"),
        ({"output_token_logprobs": [[-1, 65], [None, 66], [-1, 260]]}, r"log-prob \[nan\] of token \[1\]"),
        ({"output_token_logprobs": [[-1, 65], [-1, 66], [0.5, 260]]}, r"log-prob \[0.5\] of token \[2\]"),
        ({"output_token_logprobs": None}, "'output_token_logprobs' NoneType: expected a list"),
        ({"weight_versions": [{"version": "3", "start": 0, "end": 2}]}, "version spans .*: expected ascending, from 0 to 3"),
        ({"weight_versions": []}, "version spans"),
        ({"weight_versions": [{"version": "3", "start": 1, "end": 3}]}, "version spans"),
        ({"weight_versions": [{"version": "4", "start": 0, "end": 2}, {"version": "3", "start": 2, "end": 3}]}, "version spans"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 3}]}, "weight version 'default'"),
        ({"routed_experts": encoded(EXPERTS[:-1])}, r"18 routed experts: expected \(4, 3, 2\)"),
        ({"routed_experts": encoded(FAR)}, r"expert ids 0..8: expected 0..7"),
        ({"routed_experts": encoded(TWICE)}, r"one expert twice at \(token, layer\) \[\[2, 1\]\]"),
        ({"routed_experts": "?"}, "no base64"),
        ({"routed_experts": None}, "'routed_experts' NoneType"),
        ({"finish_reason": {"type": "stop", "matched": 66}, "extra": 0}, None),
        ({"finish_reason": {"type": "length", "length": 3}}, None),
        ({"finish_reason": {"type": "error"}}, "finish reason error after 3 tokens"),
    ],
)  # fmt: skip
def test_an_impossible_answer_is_refused_with_its_prompt_named(meta, complaint):
    if complaint is None:
        parse(changed(**meta))
    else:
        with pytest.raises(RunError, match=r"engine http://e, prompt 'p' = .*" + complaint):
            parse(changed(**meta))


def test_a_response_that_the_engine_cut_short_is_refused():
    with pytest.raises(RunError, match="finish reason length after 3 tokens: expected length at 5"):
        parse(changed(finish_reason={"type": "length", "length": 3}), limit=5)


def test_a_stop_without_an_end_of_turn_is_refused():
    answer = changed(output_token_logprobs=[[-0.5, 65], [-1.5, 66], [-2.5, 67]])
    answer["output_ids"] = [65, 66, 67]
    with pytest.raises(RunError, match="stopped at token 67"):
        parse(answer)


@pytest.mark.parametrize("ids", [[], [65, 66, 264], [-1, 66, 260]])
def test_impossible_token_ids_are_refused(ids):
    answer = changed(output_token_logprobs=[[-1, i] for i in ids])
    answer["output_ids"] = ids
    with pytest.raises(RunError, match="token ids"):
        parse(answer)


def test_a_scored_sequence_has_the_logprobs_of_its_response():
    meta = {
        "input_token_logprobs": [[None, 1], [-9.0, 2], [-1.0, 3], [-2.0, 4]],
        "routed_experts": encoded(EXPERTS[:3]),
    }
    scored = parse_scored({"meta_info": meta}, [1, 2, 3, 4], 2, FACTS, True, "who")
    assert scored.logp.tolist() == [-1.0, -2.0]
    assert scored.experts.shape == (3, 2, 2)
    with pytest.raises(RunError, match="4 scored tokens: expected the 4 that were given"):
        parse_scored({"meta_info": meta}, [1, 2, 3, 5], 2, FACTS, True, "who")


def run(served_model, handlers, work, *, timeout_s=5.0, dead=None, temperature=1.0, room=256):
    """`work(engine)` against an HTTP server whose /generate takes the next handler, the last one for ever."""
    seen = []

    async def generate(request):
        seen.append(await request.json())
        return await handlers[min(len(seen), len(handlers)) - 1](request)

    async def main():
        app = web.Application()
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        engine = SGLangEngine(
            f"http://127.0.0.1:{port}",
            served_model,
            RolloutConfig(request_timeout_s=timeout_s, record_experts=False, max_running_requests=room),
            SamplingConfig(max_response_tokens=3, temperature=temperature),
            lambda: dead,
        )
        try:
            return await work(engine)
        finally:
            await engine.close()
            await runner.cleanup()

    return asyncio.run(main()), seen


PROMPT = Prompt(uid="p", token_ids=np.array(PROMPT_IDS, np.int32), text="", answer="")
ABORTED = changed(finish_reason={"type": "abort", "message": "Aborted"})


def json_answer(value, status=200):
    async def handler(request):
        return web.json_response(value, status=status)

    return handler


async def reset(request):
    request.transport.abort()
    return web.Response()


async def never(request):
    await asyncio.sleep(60)
    return web.Response()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(client, "RETRY_AFTER_S", 0.01)
    monkeypatch.setattr(client, "DEATH_SHOWS_WITHIN_S", 0.2)


def test_the_request_asks_for_the_whole_distribution(served_model):
    (response,), (request,) = run(
        served_model, [json_answer(ANSWER)], lambda e: e.sample(PROMPT, 1), temperature=0.7
    )
    assert response.token_ids.tolist() == [65, 66, 260]
    assert request["input_ids"] == [1, 2]
    assert request["sampling_params"] == {
        "n": 1, "temperature": 0.7, "top_p": 1.0, "top_k": -1, "max_new_tokens": 3, "stop_token_ids": [260],
    }  # fmt: skip


@pytest.mark.parametrize("first", [json_answer({}, 503), reset, json_answer([ABORTED, ANSWER])])
def test_a_passing_failure_is_tried_again(served_model, quick, first):
    responses, seen = run(served_model, [first, json_answer([ANSWER, ANSWER])], lambda e: e.sample(PROMPT, 2))
    assert len(responses) == len(seen) == 2


@pytest.mark.parametrize(
    ("handler", "complaint"),
    [
        (json_answer({"error": "broken"}, 500), "HTTP 500: .*broken.*prompt 'p'"),
        (reset, "ServerDisconnectedError.*prompt 'p'"),
        (json_answer([ABORTED, ABORTED]), "prompt 'p' = aborted 3 times .Aborted."),
    ],
)
def test_a_lasting_failure_is_raised_after_three_attempts(served_model, quick, handler, complaint):
    seen = []

    async def counted(request):
        seen.append(request)
        return await handler(request)

    with pytest.raises(RunError, match=complaint):
        run(served_model, [counted], lambda e: e.sample(PROMPT, 2))
    assert len(seen) == 3


def test_a_refusal_is_never_tried_again(served_model):
    seen = []

    async def refuse(request):
        seen.append(request)
        return web.json_response({"error": {"message": "too long"}}, status=400)

    with pytest.raises(RunError, match=r"HTTP 400: .*too long.*prompt 'p'"):
        run(served_model, [refuse], lambda e: e.sample(PROMPT, 1))
    assert len(seen) == 1


def test_a_request_without_an_answer_says_who_waited_for_whom(served_model):
    with pytest.raises(
        RunError, match=r"/generate = no answer: prompt 'p' waited 0 s .*the server still runs"
    ):
        run(served_model, [never], lambda e: e.sample(PROMPT, 1), timeout_s=0.3)


def test_no_more_is_in_flight_than_the_server_runs_and_waiting_for_it_is_not_on_the_clock(served_model):
    """Room for 3, groups of 2, 2, 5 and 1: one after another, since nobody overtakes; 1.2 s in all."""
    running, most, order = 0, 0, []

    async def slow(request):
        nonlocal running, most
        num = (await request.json())["sampling_params"]["n"]
        order.append(num)
        running, most = running + min(num, 3), max(most, running + min(num, 3))
        await asyncio.sleep(0.3)
        running -= min(num, 3)
        return web.json_response([ANSWER] * num)

    async def work(engine):
        return await asyncio.gather(*(engine.sample(PROMPT, num) for num in (2, 2, 5, 1)))

    responses, _ = run(served_model, [slow], work, timeout_s=0.8, room=3)
    assert [len(group) for group in responses] == [2, 2, 5, 1]
    assert most == 3
    assert order == [2, 2, 5, 1]


def test_a_dead_engine_is_reported_with_its_log(served_model, quick):
    with pytest.raises(RunError, match=r"= dead: prompt 'p' waited for it; it exited with status 1: the end"):
        run(served_model, [reset], lambda e: e.sample(PROMPT, 1), dead="exited with status 1: the end")


def test_too_few_answers_are_refused(served_model):
    with pytest.raises(RunError, match="prompt 'p' = 1 answers: expected 2"):
        run(served_model, [json_answer([ANSWER])], lambda e: e.sample(PROMPT, 2))


def test_weights_that_change_while_a_sequence_is_scored_are_noticed(served_model):
    whole = {
        "meta_info": {
            "weight_version": "4",
            "finish_reason": None,
            "input_token_logprobs": [[None, 1], [-1, 2], [-1, 3]],
        }
    }
    one = {
        "meta_info": {
            "weight_version": "5",
            "finish_reason": None,
            "output_token_ids_logprobs": [[[-1.0, 3, None]]],
        }
    }
    given = TrainSequence(uid="s", token_ids=np.array([1, 2, 3], np.int32), num_prompt_tokens=2)
    handlers = [json_answer(json.loads(json.dumps(whole))), json_answer([one])]
    with pytest.raises(RunError, match="sequence 's' = weights changed while scoring"):
        run(served_model, handlers, lambda e: e.score([given]), temperature=0.5)
