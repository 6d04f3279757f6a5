"""Whatever single engines do, no prompt is lost, no token is lost or doubled, and the order is kept."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

from megatron_vespo.config import ConfigError, RolloutConfig
from megatron_vespo.rollout import lifecycle, member
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.lifecycle import State
from megatron_vespo.types import Prompt, RunError, Sampling, TrainSequence
from tests.rollout.fake_engine import FakeEngine, expected_experts, expected_logp

PROMPT = Prompt(uid="p", token_ids=np.array([9, 8, 7], np.int32), text="", answer="")
SAMPLING = Sampling(temperature=0.7, max_tokens=6)


def prompts(num):
    """Prompts that share nothing."""
    return [
        Prompt(uid=f"{i}", token_ids=np.array([i, 8, 7], np.int32), text="", answer="") for i in range(num)
    ]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(member, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(member, "HEALTH_EVERY_S", 0.01)
    monkeypatch.setattr(member, "OVER_S", 0.0)
    monkeypatch.setattr(lifecycle, "FIRST_RESTART_AFTER_S", 0.01)


class Case:
    """A fleet over fake engines, all of which serve version 0."""

    def __init__(self, fleet, engines, told):
        self.fleet, self.engines, self.told = fleet, engines, told

    def member(self, i):
        return self.fleet._members[f"engine {i}"]

    async def push(self, version):
        """A weight push to whoever needs it; True for those that serve then."""
        behind = await self.fleet.to_update(version)
        for one in behind:
            next(e for e in self.engines if e.name == one.name).push(version)
        return [self.fleet.confirm(one.name, version) for one in behind]

    async def until(self, done):
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.002)


def run(served_model, work, *, num=2, engines=None, serve=True, **fields):
    """`work(case)` within a deadline."""
    cfg = RolloutConfig(**({"stall_timeout_s": 5, "request_timeout_s": 20, "max_restarts": 2} | fields))

    @asynccontextmanager
    async def case():
        told = []
        fakes = engines or [FakeEngine(f"engine {i}") for i in range(num)]
        async with Fleet(cfg, served_model, fakes, told.append) as fleet:
            one = Case(fleet, fakes, told)
            if serve:
                await one.until(lambda: all(m.life.lives for m in fleet.members))
                await one.push(0)
            yield one

    async def main():
        async with asyncio.timeout(30), case() as one:
            return await work(one)

    return asyncio.run(main())


def check(response, *, num_prompt=3, limit=6):
    """Token by token what an engine computed, whatever happened in between."""
    ids, versions = response.token_ids.tolist(), response.versions.tolist()
    assert ids == [(ids[0] + i) % 250 for i in range(limit)]
    assert response.behavior_logp.tolist() == pytest.approx(expected_logp(versions), rel=1e-6, abs=1e-6)
    assert response.experts.tolist() == expected_experts(num_prompt, versions)
    assert versions == sorted(versions)


def firsts(responses):
    return [r.token_ids[0] for r in responses]


def test_the_responses_of_a_prompt_go_to_one_engine_as_one_request(served_model):
    async def work(case):
        return await case.fleet.sample(PROMPT, 4, SAMPLING), [e.requests for e in case.engines]

    responses, requests = run(served_model, work)
    ((fields,),) = [r for r in requests if r]
    assert fields["input_ids"] == [[9, 8, 7]] * 4
    assert len(set(fields["rid"])) == 4
    assert fields["sampling_params"][0] == {
        "temperature": 0.7, "top_p": 1.0, "top_k": -1, "max_new_tokens": 6, "stop_token_ids": [260],
    }  # fmt: skip
    for response in responses:
        check(response)
        assert (response.num_resumed, response.engine) == (0, f"engine {requests.index([fields])}")
    assert len(set(firsts(responses))) == 4


def test_a_long_prompt_is_sent_ahead_of_its_responses(served_model):
    long = Prompt(uid="l", token_ids=np.arange(1100, dtype=np.int32) % 250, text="", answer="")

    async def work(case):
        await case.fleet.sample(long, 2, SAMPLING)  # saves 1100
        await case.fleet.sample(long, 3, SAMPLING)  # saves 2200
        return case.engines[0].requests

    engine = FakeEngine("engine 0", num_prompt=1100)
    requests = run(served_model, work, engines=[engine])
    assert [len(r["input_ids"]) for r in requests] == [2, 1, 3]
    assert requests[1]["sampling_params"] == {"max_new_tokens": 0}
    assert requests[1]["input_ids"][0] == long.token_ids.tolist()


def test_where_the_cache_outlives_a_push_no_prefix_of_other_weights_is_shared(served_model):
    async def work(case):
        await case.fleet.sample(PROMPT, 1, SAMPLING)
        with case.fleet.updating(["engine 0"]):
            for _ in range(2):  # nobody knows whether these meet old or new weights
                await case.fleet.sample(PROMPT, 1, SAMPLING)
        await case.push(1)
        await case.fleet.sample(PROMPT, 1, SAMPLING)
        return [request.get("extra_key") for request in case.engines[0].requests]

    before, one, other, after = run(served_model, work, num=1, partial_rollouts="in_place")
    assert (before, after) == ("version 0", "version 1")
    assert len({before, one, other, after}) == 4
    assert run(served_model, work, num=1) == [None] * 4


def test_a_token_of_which_the_server_would_die_is_not_sent(served_model):
    async def work(case):
        odd = Prompt(uid="odd", token_ids=np.array([9, 10**6], np.int32), text="", answer="")
        with pytest.raises(RunError, match="prompt 'odd' = token id 1000000: expected ids below"):
            await case.fleet.sample(odd, 1, SAMPLING)
        return [request for engine in case.engines for request in engine.requests]

    assert run(served_model, work) == []


def test_top_p_goes_through(served_model):
    async def work(case):
        await case.fleet.sample(PROMPT, 1, Sampling(temperature=1.0, max_tokens=2, top_p=0.8))
        return case.engines[0].requests[0]["sampling_params"][0]["top_p"]

    assert run(served_model, work, num=1) == 0.8


def test_an_interrupted_response_goes_on_with_all_it_had(served_model):
    """Six tokens: two of version 0, given back; three of version 1, given back; one of version 2."""

    async def work(case):
        (engine,) = case.engines
        engine.stop_after = 2
        sampling = asyncio.create_task(case.fleet.sample(PROMPT, 3, SAMPLING))
        for version, stop_after in ((1, 3), (2, None)):
            await case.until(lambda: engine.running and all(not s.may_go_on for s in engine.running.values()))
            with case.fleet.updating(["engine 0"]):
                engine.stop_after = stop_after
                await case.fleet.to_update(version)
                engine.push(version)
                engine.give_back()
                case.fleet.confirm("engine 0", version)
        return await sampling, engine.requests

    responses, requests = run(served_model, work, num=1)
    for response in responses:
        check(response)
        assert response.versions.tolist() == [0, 0, 1, 1, 1, 2]
        assert response.num_resumed == 2
    assert [len(r["input_ids"]) for r in requests] == [3, 3, 3]
    assert [len(r["input_ids"][0]) for r in requests] == [3, 5, 8]
    assert [r["sampling_params"][0]["max_new_tokens"] for r in requests] == [6, 4, 1]
    assert [r["routed_experts_start_len"] for r in requests] == [0, 4, 7]


def test_what_was_finished_with_its_group_is_not_sampled_again(served_model):
    """Of three responses one is given back after two tokens."""

    async def work(case):
        (engine,) = case.engines
        engine.stop_after = 2
        sampling = asyncio.create_task(case.fleet.sample(PROMPT, 3, SAMPLING))
        await case.until(lambda: engine.running and all(not s.may_go_on for s in engine.running.values()))
        list(engine.running.values())[1].aborted = True
        engine.stop_after = None
        engine.poke()
        return await sampling, engine.requests

    responses, requests = run(served_model, work, num=1)
    assert [len(r["input_ids"]) for r in requests] == [3, 1]
    assert [r.num_resumed for r in responses] == [0, 1, 0]
    for response in responses:
        check(response)


def test_parts_of_different_lengths_go_on_in_one_request(served_model):
    async def work(case):
        (engine,) = case.engines
        engine.stop_after = 1
        sampling = asyncio.create_task(case.fleet.sample(PROMPT, 2, SAMPLING))
        await case.until(lambda: len(engine.running) == 2 and engine.num_tokens == 2)
        list(engine.running.values())[1].step()  # this one is two tokens long
        engine.stop_after = None
        engine.give_back()
        return await sampling, engine.requests

    responses, requests = run(served_model, work, num=1)
    assert [len(ids) for ids in requests[1]["input_ids"]] == [4, 5]
    assert requests[1]["routed_experts_start_len"] == 3  # rows of 4 tokens: 0 .. 2
    for response in responses:
        check(response)


def test_responses_under_way_when_their_engine_dies_are_sampled_elsewhere(served_model):
    async def work(case):
        dying = case.engines[0]
        for engine in case.engines:
            engine.stop_after = 2
        tasks = [asyncio.create_task(case.fleet.sample(PROMPT, 2, SAMPLING)) for _ in range(4)]
        await case.until(lambda: sum(e.num_tokens for e in case.engines) == 16)
        assert dying.running
        for engine in case.engines:
            engine.stop_after = None
        await dying.die()
        case.engines[1].poke()
        groups = await asyncio.gather(*tasks)
        await case.until(lambda: case.member(0).state is State.STALE)
        return groups, case

    groups, case = run(served_model, work)
    responses = [r for group in groups for r in group]
    assert len(responses) == 8
    assert len(set(firsts(responses))) == 8
    for response in responses:
        check(response)
    assert {r.engine for r in responses} == {"engine 1"}
    assert case.engines[0].num_starts == 2
    (message,) = [m for m in case.told if "is lost" in m]
    assert "engine 0 is lost, its work goes elsewhere" in message
    assert "killed by SIGKILL" in message
    assert "out of memory" in message
    assert "1 of 2 engines serve; it is started again in 0.01 s (restart 1 in a row of 2)" in message


def test_tokens_that_came_back_survive_the_death_of_the_engine_that_had_the_rest(served_model):
    """Two tokens from a first part; the engine dies with the second; the other one goes on from two tokens."""

    async def work(case):
        for engine in case.engines:
            engine.stop_after = 2
        sampling = asyncio.create_task(case.fleet.sample(PROMPT, 1, SAMPLING))
        await case.until(lambda: any(e.num_tokens == 2 for e in case.engines))
        first = next(e for e in case.engines if e.running)
        other = next(e for e in case.engines if e is not first)
        first.give_back()
        await case.until(lambda: len(first.requests) == 2 and first.num_tokens == 4)
        other.stop_after = None
        await first.die()
        (response,) = await sampling
        return response, other

    response, other = run(served_model, work)
    check(response)
    assert response.num_resumed == 2
    assert response.engine == other.name
    assert [len(r["input_ids"][0]) for r in other.requests] == [5]


def test_a_restarted_engine_gets_nothing_until_it_is_confirmed(served_model):
    async def work(case):
        case.fleet.lose("engine 0", "a test said so")
        await case.until(lambda: case.member(0).state is State.STALE)
        await case.fleet.newcomer()
        before = len(case.engines[0].requests)
        await asyncio.gather(*(case.fleet.sample(PROMPT, 1, SAMPLING) for _ in range(20)))
        assert len(case.engines[0].requests) == before
        assert [m.name for m in await case.fleet.to_update(0)] == ["engine 0"]
        assert case.fleet.confirm("engine 0", 0)
        other = Prompt(uid="q", token_ids=PROMPT.token_ids, text="", answer="")
        case.engines[1].stop_after = 0
        held = [asyncio.create_task(case.fleet.sample(other, 8, SAMPLING)) for _ in range(2)]
        await case.until(lambda: len(case.engines[0].requests) > before)
        case.engines[1].stop_after = None
        case.engines[1].poke()
        await asyncio.gather(*held)

    run(served_model, work)


def test_an_engine_that_was_lost_while_it_was_pushed_to_is_not_confirmed(served_model):
    async def work(case):
        await case.fleet.to_update(1)
        case.fleet.lose("engine 0", "a test said so")
        assert not case.fleet.confirm("engine 0", 1)
        await case.until(lambda: case.member(0).state is State.STALE)
        assert not case.fleet.confirm("engine 0", 1)  # it runs the weights on disk
        assert case.fleet.confirm("engine 1", 1)
        assert case.member(0).state is State.STALE

    run(served_model, work)


def test_engines_behind_the_newest_version_end_what_they_have_and_get_nothing_new(served_model):
    async def work(case):
        new, old = case.engines
        old.stop_after = new.stop_after = 1
        under_way = [asyncio.create_task(case.fleet.sample(p, 8, SAMPLING)) for p in prompts(2)]
        await case.until(lambda: new.running and old.running)
        await case.fleet.to_update(1)
        new.push(1)
        case.fleet.confirm("engine 0", 1)
        assert case.member(1).state is State.STALE
        old.stop_after = new.stop_after = None
        before = len(old.requests)
        old.poke()
        new.poke()
        groups = await asyncio.gather(*under_way)
        await asyncio.gather(*(case.fleet.sample(PROMPT, 1, SAMPLING) for _ in range(10)))
        assert len(old.requests) == before
        return groups

    for group in run(served_model, work):
        for response in group:
            check(response)


def test_an_answer_with_unconfirmed_weights_is_held_until_they_are_confirmed(served_model):
    async def work(case):
        (engine,) = case.engines
        engine.stop_after = 2
        sampling = asyncio.create_task(case.fleet.sample(PROMPT, 1, SAMPLING))
        await case.until(lambda: engine.num_tokens == 2)
        await case.fleet.to_update(1)
        engine.push(1)
        engine.stop_after = None
        engine.poke()
        await case.until(lambda: not engine.running)
        await asyncio.sleep(0.05)
        assert not sampling.done()
        case.fleet.confirm("engine 0", 1)
        return (await sampling)[0]

    response = run(served_model, work, num=1)
    assert response.versions.tolist() == [0, 0, 1, 1, 1, 1]
    check(response)


def test_tokens_of_weights_that_are_never_confirmed_are_not_kept(served_model):
    async def work(case):
        engine, other = case.engines
        engine.stop_after = other.stop_after = 2
        sampling = asyncio.create_task(case.fleet.sample(PROMPT, 1, SAMPLING))
        await case.until(lambda: engine.num_tokens + other.num_tokens == 2)
        pushed, rest = (engine, other) if engine.running else (other, engine)
        await case.fleet.to_update(1)
        pushed.push(1)
        pushed.stop_after = rest.stop_after = None
        pushed.poke()
        await case.until(lambda: not pushed.running)
        case.fleet.lose(pushed.name, "the canary failed")
        return (await sampling)[0], rest.name

    response, rest = run(served_model, work)
    assert response.versions.tolist() == [0] * 6
    assert response.engine == rest
    check(response)


def _old_version(answers):
    for answer in answers:
        answer["meta_info"]["weight_versions"] = [{"version": "0", "start": 0, "end": 6}]
    return answers


def _never_pushed(answers):
    for answer in answers:
        answer["meta_info"]["weight_versions"] = [{"version": "9", "start": 0, "end": 6}]
    return answers


def _no_experts(answers):
    for answer in answers:
        del answer["meta_info"]["routed_experts"]
    return answers


def _nan(answers):
    answers[0]["meta_info"]["output_token_logprobs"][1][0] = None
    return answers


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (_old_version, "weight version 0: expected at least 1"),
        (_never_pushed, "weight version 9: expected at most 1"),
        (_no_experts, "'routed_experts' NoneType"),
        (_nan, "log-prob [nan] of token [1]"),
        (lambda answers: answers[:1], "1 answers: expected 2"),
        ((200, ["garbage"] * 2), "an answer without fields"),
    ],
)
def test_an_engine_with_an_impossible_answer_is_lost_and_another_one_answers(served_model, reply, reason):
    async def work(case):
        await case.push(1)
        case.engines[0].script = case.engines[1].script = script = [reply]
        responses = await case.fleet.sample(PROMPT, 2, SAMPLING)
        assert not script
        await case.until(lambda: any("is lost" in m for m in case.told))
        return responses, [m for m in case.told if "is lost" in m]

    responses, (message,) = run(served_model, work)
    assert f"its answer cannot be used: {reason}" in message
    for response in responses:
        check(response)


def test_two_engines_with_impossible_answers_end_the_sampling_with_both_reasons(served_model):
    async def work(case):
        for engine in case.engines:
            engine.script = [_nan]
        await case.fleet.sample(PROMPT, 2, SAMPLING)

    with pytest.raises(RunError, match=r"prompt 'p' = unusable: (?s:.*)engine 0: (?s:.*)engine 1: "):
        run(served_model, work)


def test_a_refusal_is_never_tried_again(served_model):
    async def work(case):
        for engine in case.engines:
            engine.script = [(400, {"error": {"message": "too long"}})]
        with pytest.raises(RunError, match=r"prompt 'p' = refused: (?s:.*)HTTP 400: .*too long"):
            await case.fleet.sample(PROMPT, 1, SAMPLING)
        return sum(len(e.requests) for e in case.engines), case.fleet.metrics()

    num, metrics = run(served_model, work)
    assert num == 1
    assert metrics["fleet/refused"] == 1
    assert metrics["fleet/engines_serving"] == 2


def test_a_failure_that_passes_is_tried_again_elsewhere_and_counted(served_model):
    async def work(case):
        case.engines[0].script = case.engines[1].script = script = [(503, {})]
        responses = await case.fleet.sample(PROMPT, 2, SAMPLING)
        assert not script
        return responses, [len(e.requests) for e in case.engines], case.fleet.metrics()

    responses, requests, metrics = run(served_model, work)
    assert requests == [1, 1]
    assert metrics["fleet/failed"] == 1
    assert [r.num_resumed for r in responses] == [0, 0]  # nothing was kept


def test_an_engine_that_fails_again_and_again_is_lost(served_model):
    async def work(case):
        case.engines[0].script = [(500, {"detail": "CUDA error"})] * 100
        await asyncio.gather(*(case.fleet.sample(p, 1, SAMPLING) for p in prompts(12)))
        await case.until(lambda: any("is lost" in m for m in case.told))
        return case.told

    (message,) = [m for m in run(served_model, work) if "is lost" in m]
    assert "requests in a row failed" in message
    assert "CUDA error" in message


def test_a_request_without_an_answer_is_aborted_and_asked_elsewhere(served_model):
    async def work(case):
        for engine in case.engines:
            engine.stop_after = 1
        sampling = asyncio.create_task(case.fleet.sample(PROMPT, 2, SAMPLING))
        await case.until(lambda: any(e.running for e in case.engines))
        slow = next(e for e in case.engines if e.running)
        other = next(e for e in case.engines if e is not slow)
        other.stop_after = None
        responses = await sampling
        await case.until(lambda: len(slow.aborts) == 2)
        return responses, slow.requests[0]["rid"], slow.aborts, case.fleet.metrics()

    responses, rids, aborts, metrics = run(served_model, work, request_timeout_s=0.3)
    assert sorted(aborts) == sorted(rids)
    assert metrics["fleet/silent"] == 1
    for response in responses:
        check(response)


def test_no_deadline_runs_while_weights_are_pushed(served_model):
    async def work(case):
        (engine,) = case.engines
        engine.stop_after = 1
        sampling = asyncio.create_task(case.fleet.sample(PROMPT, 1, SAMPLING))
        await case.until(lambda: engine.running)
        with case.fleet.updating(["engine 0"]):
            engine.frozen = True
            await asyncio.sleep(0.5)
            engine.frozen = False
        engine.stop_after = None
        engine.poke()
        await sampling
        return case.fleet.metrics()

    metrics = run(served_model, work, num=1, request_timeout_s=0.3, stall_timeout_s=0.2)
    assert metrics["fleet/silent"] == metrics["fleet/restarts"] == 0


def test_an_engine_that_counts_nothing_though_it_has_requests_hangs(served_model):
    async def work(case):
        for engine in case.engines:
            engine.stop_after = 1
        sampling = asyncio.create_task(case.fleet.sample(PROMPT, 2, SAMPLING))
        await case.until(lambda: any(e.running for e in case.engines))
        hung = next(e for e in case.engines if e.running)
        hung.frozen = True
        next(e for e in case.engines if e is not hung).stop_after = None
        responses = await sampling
        await case.until(lambda: any("is lost" in m for m in case.told))
        return responses, hung.name, case.told

    responses, name, told = run(served_model, work, stall_timeout_s=0.2)
    (message,) = [m for m in told if "is lost" in m]
    assert message.startswith(f"{name} is lost")
    assert "it hangs: with 2 sequences for 0 s (rollout.stall_timeout_s = 0.2)" in message
    for response in responses:
        check(response)


def test_an_idle_engine_that_is_not_healthy_hangs(served_model):
    async def work(case):
        case.engines[0].healthy = False
        await case.until(lambda: any("is lost" in m for m in case.told))
        case.engines[0].healthy = True
        await case.until(lambda: case.member(0).state is State.STALE)
        return [m for m in case.told if "is lost" in m]

    (message,) = run(served_model, work, stall_timeout_s=0.2)
    assert "it hangs: idle, and /health fails" in message


def test_a_cancelled_sampling_frees_the_engine(served_model):
    async def work(case):
        (engine,) = case.engines
        engine.stop_after = 1
        sampling = asyncio.create_task(case.fleet.sample(PROMPT, 3, SAMPLING))
        await case.until(lambda: len(engine.running) == 3)
        sampling.cancel()
        await case.until(lambda: not engine.running)
        assert sorted(engine.aborts) == sorted(engine.requests[0]["rid"])
        return case.fleet.metrics()

    assert run(served_model, work, num=1)["fleet/running"] == 0


def test_a_drained_engine_ends_what_it_has_and_is_stopped(served_model):
    async def work(case):
        for engine in case.engines:
            engine.stop_after = 1
        tasks = [asyncio.create_task(case.fleet.sample(p, 8, SAMPLING)) for p in prompts(2)]
        await case.until(lambda: all(e.running for e in case.engines))
        drain = asyncio.create_task(case.fleet.drain("engine 0"))
        await case.until(lambda: case.member(0).state is State.DRAINING)
        for engine in case.engines:
            engine.stop_after = None
            engine.poke()
        await drain
        groups = await asyncio.gather(*tasks)
        assert case.member(0).state is State.GONE
        await case.fleet.sample(PROMPT, 1, SAMPLING)
        return groups, case.engines[0]

    groups, drained = run(served_model, work)
    assert len(drained.requests) == drained.num_stops == 1
    for group in groups:
        for response in group:
            check(response)
            assert response.num_resumed == 0


def test_what_a_drained_engine_does_not_end_in_time_goes_on_elsewhere(served_model):
    async def work(case):
        engine, other = case.engines
        engine.stop_after = other.stop_after = 2
        sampling = asyncio.create_task(case.fleet.sample(PROMPT, 2, SAMPLING))
        await case.until(lambda: engine.num_tokens + other.num_tokens == 4)
        drained = engine if engine.running else other
        (engine if drained is other else other).stop_after = None
        await case.fleet.drain(drained.name, within_s=0.05)
        return await sampling, drained.name

    responses, drained = run(served_model, work)
    for response in responses:
        check(response)
        assert response.num_resumed == 1
        assert response.engine != drained


def test_an_engine_that_is_added_serves_once_it_is_pushed_to(served_model):
    async def work(case):
        case.fleet.add(late := FakeEngine("engine 9"))
        case.engines.append(late)
        await case.fleet.newcomer()
        assert await case.push(0) == [True]
        await case.fleet.drain("engine 0")
        (response,) = await case.fleet.sample(PROMPT, 1, SAMPLING)
        with pytest.raises(ValueError, match="is taken"):
            case.fleet.add(FakeEngine("engine 0"))
        return response.engine

    assert run(served_model, work, num=1) == "engine 9"


def test_an_engine_that_never_comes_back_is_given_up_and_the_last_one_ends_the_run(served_model):
    async def work(case):
        for engine in case.engines:
            engine.start_failures = [RunError("no GPU there")] * 10
            await engine.die()
        waiting = asyncio.create_task(case.fleet.newcomer())
        with pytest.raises(
            RunError, match=r"(?s)engines = none left.*engine 0: .*no GPU there.*engine 1: .*no GPU"
        ):
            await case.fleet.sample(PROMPT, 1, SAMPLING)
        with pytest.raises(RunError, match="none left"):
            await waiting
        return [e.num_starts for e in case.engines], case.told

    starts, told = run(served_model, work)
    assert starts == [3, 3]  # the first, and two restarts
    assert (
        sum("is given up: did not serve after 2 restarts in a row (rollout.max_restarts)" in m for m in told)
        == 2
    )


def test_restarts_are_counted_anew_once_an_engine_has_served(served_model):
    async def work(case):
        (engine,) = case.engines
        for _ in range(5):  # of 2 in a row
            await case.until(
                lambda: case.member(0).state is State.STALE or case.member(0).version is not None
            )
            await case.push(0)
            await case.fleet.sample(PROMPT, 1, SAMPLING)
            await engine.die()
            await case.until(lambda: case.member(0).state is State.STALE)
        return engine.num_starts

    assert run(served_model, work, num=1) == 6


def test_a_configuration_that_cannot_start_ends_the_run_at_once(served_model):
    bad = FakeEngine("engine 1")
    bad.start_failures = [ConfigError("rollout.sglang.tp-sizee: no such option")]

    async def work(case):
        with pytest.raises(ConfigError, match="no such option"):
            await case.fleet.sample(PROMPT, 1, SAMPLING)

    run(served_model, work, engines=[FakeEngine("engine 0"), bad], serve=False)


def test_the_oldest_prompt_is_sampled_first_and_nobody_overtakes_it(served_model):
    async def work(case):
        (engine,) = case.engines
        engine.stop_after = 0
        tasks = [asyncio.create_task(case.fleet.sample(p, 2, SAMPLING)) for p in prompts(6)]
        await case.until(lambda: len(engine.running) == 2)
        assert case.fleet.metrics()["fleet/waiting"] == 10
        engine.stop_after = None
        engine.poke()
        await asyncio.gather(*tasks)
        return [r["input_ids"][0][0] for r in engine.requests]

    assert run(served_model, work, num=1, max_running_requests=4) == list(range(6))


def test_scores_come_in_order_and_from_the_newest_weights(served_model):
    given = [
        TrainSequence(uid=f"s{n}", token_ids=np.arange(n, dtype=np.int32), num_prompt_tokens=2)
        for n in (3, 5, 4)
    ]

    async def work(case):
        await case.fleet.to_update(1)
        case.engines[1].push(1)
        (canary,) = await case.fleet.score_on("engine 1", given[:1])
        assert canary.logp.tolist() == pytest.approx([-0.1])
        with pytest.raises(RunError, match="under weight version 0: expected 1"):
            await case.fleet.score_on("engine 0", given[:1])
        case.fleet.confirm("engine 1", 1)
        return await case.fleet.score(given)

    scored = run(served_model, work)
    assert [s.logp.tolist() for s in scored] == [pytest.approx([-0.1] * n) for n in (1, 3, 2)]
    assert [s.experts.shape for s in scored] == [(2, 4, 2), (4, 4, 2), (3, 4, 2)]


def test_a_scoring_does_not_wait_for_engines_that_come_back_with_other_weights(served_model):
    """One engine dies with the scoring under way; it is back at once, but not confirmed: there is nobody to ask."""
    given = [TrainSequence(uid="s", token_ids=np.arange(4, dtype=np.int32), num_prompt_tokens=2)] * 3

    async def work(case):
        await case.engines[0].die()
        await case.until(lambda: case.member(0).state is State.STALE)
        nobody = await case.fleet.score(given)
        await case.push(1)
        return nobody, await case.fleet.score(given)

    nobody, somebody = run(served_model, work, num=1)
    assert nobody == (None, None, None)
    assert [s.logp.tolist() for s in somebody] == [pytest.approx([-0.1] * 2)] * 3


class Chaos:
    """Things that happen to engines."""

    def __init__(self, case, rng):
        self.case, self.rng, self.version = case, rng, 0

    async def die(self, engine):
        if engine._runner is not None:
            await engine.die()

    async def answer_nonsense(self, engine):
        engine.script.append(_nan)

    async def fail(self, engine):
        engine.script.append((500, {}))

    async def give_back(self, engine):
        engine.give_back()

    async def lose(self, engine):
        self.case.fleet.lose(engine.name, "a test said so")

    async def push(self, _):
        self.version += 1
        behind = await self.case.fleet.to_update(self.version)
        with self.case.fleet.updating([m.name for m in behind]):
            for one in behind:
                fake = next(e for e in self.case.engines if e.name == one.name)
                fake.push(self.version)
                fake.give_back()
                await asyncio.sleep(0)
                self.case.fleet.confirm(one.name, self.version)

    async def happens(self, num):
        faults = [self.die, self.answer_nonsense, self.fail, self.give_back, self.lose, *[self.push] * 3]
        for _ in range(num):
            await faults[self.rng.integers(len(faults))](self.case.engines[self.rng.integers(4)])
            await asyncio.sleep(0.005)


def test_many_prompts_survive_engines_that_die_fail_and_answer_nonsense_while_weights_move(served_model):
    """60 prompts x 4 over 4 engines; every response is checked token by token."""

    async def work(case):
        chaos = Chaos(case, np.random.default_rng(0))
        tasks = [asyncio.create_task(case.fleet.sample(p, 4, SAMPLING)) for p in prompts(60)]
        await chaos.happens(60)
        while not all(task.done() for task in tasks):  # whoever was restarted must be pushed to
            await case.push(chaos.version)
            await asyncio.sleep(0.005)
        return [await task for task in tasks], case.fleet.metrics()

    groups, metrics = run(served_model, work, num=4, max_restarts=100, max_running_requests=12)
    assert metrics["fleet/responses"] == 240
    assert metrics["fleet/running"] == metrics["fleet/waiting"] == 0
    assert metrics["fleet/restarts"] > 4
    responses = [response for group in groups for response in group]
    assert len(responses) == 240
    for response in responses:
        check(response)
