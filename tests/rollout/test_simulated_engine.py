"""The simulated engine answers as the real one, on time, what its arguments determine; and fails as told."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import heapq
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from datetime import timedelta

import aiohttp
import numpy as np
import pytest
import torch
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper

from megatron_vespo.config import ConfigError, RolloutConfig
from megatron_vespo.rollout.engine_control import Target
from megatron_vespo.rollout.simulated_engine import (
    Behaviour,
    SimulatedServer,
    SimulatedServers,
    simulated_logp,
)
from megatron_vespo.rollout.simulated_engine.behaviour import Lengths
from megatron_vespo.rollout.simulated_engine.content import Content, Stream
from megatron_vespo.rollout.simulated_engine.engine import SimulatedEngine
from megatron_vespo.rollout.simulated_engine.faults import Faults
from megatron_vespo.rollout.simulated_engine.scheduler import Request, Scheduler
from megatron_vespo.rollout.weight_sync import WeightSync

PROMPT = [72, 101, 108, 108, 111, 259]
OTHER = [87, 111, 259]
END = 260
FAST = Behaviour(speedup=50, lengths="fixed:200", metrics=False)


# ---- content


@pytest.fixture(scope="module")
def content(served_model):
    return Content(served_model, Behaviour(lengths="uniform:2:60"))


def whole(content, stream):
    """The response from its first token on."""
    return content.tokens(stream, content.remaining(stream), stops=True)


@given(st.lists(st.integers(0, 131), min_size=1, max_size=8), st.integers(0, 63), st.data())
def test_any_engine_goes_on_with_a_response_that_another_one_began(content, prompt, index, data):
    ids = np.array(prompt)
    response = whole(content, replace(content.stream(ids), index=index))
    cut = data.draw(st.integers(1, len(response)))
    begun = content.stream(np.concatenate([ids, response[:cut]]))
    if cut == len(response):  # its turn is over: another one begins
        assert begun.done == 0
    else:
        assert np.concatenate([response[:cut], whole(content, begun)]).tolist() == response.tolist()


def test_responses_differ_by_prompt_sample_and_seed(served_model, content):
    ids = np.array(PROMPT)
    other = Content(served_model, Behaviour(lengths="uniform:2:60", seed=1))
    first = content.stream(ids)
    responses = [
        whole(content, first),
        whole(content, replace(first, index=1)),
        whole(content, content.stream(ids[1:])),
        whole(other, other.stream(ids)),
    ]
    assert len({tuple(response) for response in responses}) == 4
    for response in responses:
        assert 2 <= len(response) <= 60
        assert np.flatnonzero(response == END).tolist() == [len(response) - 1]


def test_lengths_follow_their_distribution():
    assert Lengths("fixed:7").at(0.3) == 7
    assert [Lengths("uniform:3:5").at(q) for q in (0.01, 0.34, 0.66, 0.67, 0.99)] == [3, 4, 4, 5, 5]
    tailed = Lengths("lognormal:200:1.0:5000")
    assert tailed.at(0.5) == 200
    assert tailed.at(0.8413447) == round(200 * np.e)  # one standard deviation
    assert tailed.at(1 - 1e-9) == 5000
    assert tailed.at(1e-9) == 1
    for nonsense in ("fixed", "uniform:3", "lognormal:a:b:c", "gauss:1"):
        with pytest.raises(ConfigError, match="expected fixed:N"):
            Lengths(nonsense)


def test_logprobs_belong_to_token_position_and_version():
    base = simulated_logp(np.array([5]), np.array([9]), 3)
    assert base.dtype == np.float32
    assert -4.01 <= base[0] <= -0.01
    for other in (([6], [9], 3), ([5], [8], 3), ([5], [9], 4)):
        assert abs(simulated_logp(np.array(other[0]), np.array(other[1]), other[2]) - base)[0] > 1e-4
    assert simulated_logp(np.array([5]), np.array([9]), 3, temperature=0.5)[0] == pytest.approx(2 * base[0])


def test_experts_are_distinct_valid_and_belong_to_token_layer_and_version(content):
    experts = content.experts(np.arange(264), 3)
    assert experts.shape == (264, 4, 2)
    assert experts.dtype == np.int32
    assert ((experts >= 0) & (experts < 8)).all()
    assert (experts[..., 0] != experts[..., 1]).all()
    assert len(np.unique(experts[:, 0], axis=0)) == 8
    assert (experts[:, 0] != experts[:, 1]).any()
    assert (experts != content.experts(np.arange(264), 4)).any()


# ---- time


class HandClock:
    """The loop of a scheduler under test: its time moves when told, and its timers ring on time or late."""

    def __init__(self):
        self.now = 0.0
        self._timers = []
        self._futures = asyncio.new_event_loop()

    def time(self):
        return self.now

    def call_later(self, delay, callback):
        timer = Timer(self.now + delay, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def create_future(self):
        return self._futures.create_future()

    def run_until(self, moment, *, punctual=True):
        while punctual and self._timers and self._timers[0].when <= moment:
            timer = heapq.heappop(self._timers)
            self.now = max(self.now, timer.when)
            timer.ring()
        self.now = moment
        while self._timers and self._timers[0].when <= moment:
            heapq.heappop(self._timers).ring()


class Timer:
    def __init__(self, when, callback):
        self.when, self.callback = when, callback

    def __lt__(self, other):
        return self.when < other.when

    def cancel(self):
        self.callback = None

    def ring(self):
        if self.callback:
            self.callback()


@pytest.fixture
def clock():
    return HandClock()


SLOW = Behaviour(
    decode_tokens_s=10, max_decode_tokens_s=20, prefill_tokens_s=1000, max_running_requests=2, speedup=1.0
)  # a step takes 0.05 s, and 0.05 s more for each request


def scheduler(clock, behaviour=SLOW, capacity=10**6):
    return Scheduler(behaviour, capacity, "0", 0, clock)


def request(clock, num_prompt=100, total=50, cached=0):
    return Request(
        rid="r", ids=np.zeros(num_prompt, np.int64), stream=Stream(0, 0, 0), total=total, stops=True, cached=cached,
        done=clock.create_future(),
    )  # fmt: skip


def test_one_request_takes_its_prefill_and_its_steps(clock):
    engine, alone = scheduler(clock), request(clock)
    engine.add(alone)
    clock.run_until(0.1 + 48.9 / 10)
    assert (alone.state, engine.num_running, engine.num_tokens) == ("decoding", 1, 149)
    clock.run_until(0.1 + 49.1 / 10)  # the prefill gave the first of 50
    assert alone.done.result() == "stop"
    assert alone.times["finished"] == pytest.approx(0.1 + 49 / 10)
    assert (engine.num_running, engine.num_tokens, engine.num_decoded) == (0, 0, 50)


def test_requests_that_decode_together_slow_each_other_down_and_others_wait(clock):
    engine = scheduler(clock)
    a, b, c = request(clock, total=21), request(clock, total=11), request(clock, total=6)
    for each in (a, b, c):
        engine.add(each)
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    clock.run_until(100)
    # a runs alone for 0.1 s (one step), then with b at 0.15 s a step until b has its 10 steps at 0.2 + 1.5 s.
    assert b.times["finished"] == pytest.approx(1.7)
    # Then c is prefilled (0.1 s, one step of a), has 5 steps together with a, and a is alone for its last 4.
    assert c.times["admitted"] == pytest.approx(1.7)
    assert c.times["finished"] == pytest.approx(1.8 + 5 * 0.15)
    assert a.times["finished"] == pytest.approx(1.8 + 5 * 0.15 + 3 * 0.1)


def test_what_is_cached_needs_no_prefill_and_scoring_needs_no_step(clock):
    engine, scored = scheduler(clock), request(clock, total=0, cached=60)
    engine.add(scored)
    clock.run_until(10)
    assert scored.times["finished"] == pytest.approx(0.04)
    assert engine.num_prefilled == 40


def test_speedup_and_slowness_scale_everything(clock):
    engine, one = scheduler(clock, replace(SLOW, speedup=10)), request(clock)
    engine.slow_down(2.0)
    engine.add(one)
    clock.run_until(10)
    assert one.times["finished"] == pytest.approx(5.0 * 2 / 10)


def test_a_stall_stops_the_time(clock):
    engine, one = scheduler(clock), request(clock)
    engine.add(one)
    for start, end in ((0.05, 1.05), (2.0, 4.0)):  # in the prefill, and in the decoding
        clock.run_until(start)
        engine.stall("pause")
        clock.run_until(end)
        engine.resume("pause")
    clock.run_until(100)
    assert one.times["finished"] == pytest.approx(5.0 + 3.0)


def test_what_is_retracted_keeps_its_tokens_and_is_prefilled_again(clock):
    engine, one = scheduler(clock), request(clock)
    engine.add(one)
    clock.run_until(0.1 + 19.5 / 10)
    engine.stall("pause")
    engine.retract_all()
    assert (one.sampled, one.retractions, engine.num_running, engine.num_waiting) == (20, 1, 0, 1)
    engine.resume("pause")
    clock.run_until(100)
    # 120 tokens of prefill give the 21st, 29 steps the rest; the half step is lost.
    assert one.times["finished"] == pytest.approx(0.1 + 1.95 + 0.12 + 2.9)


def test_a_full_cache_retracts_the_youngest_until_another_one_ends(clock):
    engine = scheduler(clock, capacity=300)
    old, young = request(clock, total=80), request(clock, total=80)
    engine.add(old)
    clock.run_until(2.05)  # it has 20 tokens
    engine.add(young)
    clock.run_until(10**3)
    assert (old.retractions, young.retractions) == (0, 1)
    assert old.times["finished"] < young.times["finished"]
    assert engine.num_decoded == 160


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(0, 3), st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=8
    ),
    st.integers(101, 400),
)  # fmt: skip
def test_late_timers_change_no_outcome(arrivals, capacity):
    """Whether we look at every event or only at arrivals, the same requests have the same tokens."""

    def run(punctual):
        clock = HandClock()
        engine = scheduler(clock, capacity=capacity)
        requests, trace = [], []
        for wait, num_prompt, total in arrivals:
            clock.run_until(clock.now + wait, punctual=punctual)
            requests.append(request(clock, num_prompt, total))
            engine.add(requests[-1])
            trace.append((engine.num_running, engine.num_waiting, engine.num_decoded, engine.num_retracted))
        clock.run_until(10**4, punctual=punctual)
        assert all(r.done.result() == "stop" and r.sampled == r.total for r in requests)
        assert (engine.num_tokens, engine.num_running) == (0, 0)
        assert engine.num_decoded == sum(r.total for r in requests)
        return trace, [r.retractions for r in requests]

    assert run(True) == run(False)


ACTS = st.sampled_from(["add", "abort", "pause", "retract", "resume", "wait", "label"])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(ACTS, st.integers(0, 30)), max_size=40))
def test_no_request_is_lost_and_no_token_counted_twice_whatever_happens(acts):
    clock = HandClock()
    engine = scheduler(clock, capacity=250)
    requests = []
    for act, number in acts:
        if act == "add":
            requests.append(request(clock, 10 + number, number))
            engine.add(requests[-1])
        elif act == "abort" and requests:
            one = requests[number % len(requests)]
            engine.abort([one] if one.state != "over" else [])
        elif act == "pause":
            engine.stall("pause")
        elif act == "retract":
            engine.stall("pause")
            engine.retract_all()
        elif act == "resume":
            engine.resume("pause")
        elif act == "label":
            engine.change_weights(str(number), number)
        else:
            clock.run_until(clock.now + number / 10)
        assert engine.num_running <= 2
        assert engine.num_tokens <= 250 + 2
    engine.resume("pause")
    clock.run_until(10**4)
    for one in requests:
        assert one.done.done()
        assert one.sampled <= one.total
        assert one.done.result() != "stop" or one.sampled == one.total
        ends = [end for end, _, _ in one.changes]
        assert all(end > 0 for end in ends[:-1])
    assert engine.num_delivered == sum(one.sampled for one in requests)
    assert (engine.num_tokens, engine.num_waiting, engine.num_running) == (0, 0, 0)


# ---- the HTTP surface, in this process


class Door:
    """An engine behind its port."""

    def __init__(self, session, url):
        self.session, self.url = session, url

    async def call(self, method, path, body=None):
        async with self.session.request(method, self.url + path, json=body) as answer:
            data = await answer.read()
            return answer.status, json.loads(data) if data[:1] in (b"{", b"[") else data.decode()

    async def post(self, path, body=None):
        status, answer = await self.call("POST", path, body or {})
        assert status == 200, answer
        return answer

    async def generate(self, ids=PROMPT, **body):
        params = {"max_new_tokens": 500, **body.pop("params", {})}
        return await self.post(
            "/generate",
            {"input_ids": ids, "sampling_params": params, "return_logprob": True, "return_routed_experts": True}
            | body,
        )  # fmt: skip

    def begin(self, *args, **kwargs):
        return asyncio.create_task(self.generate(*args, **kwargs))

    async def until(self, holds):
        """Wait until `holds(state)`, and return the state."""
        async with asyncio.timeout(20):
            while not holds(state := await self.post("/simulate")):
                await asyncio.sleep(0.002)
            return state


@contextlib.asynccontextmanager
async def door(model, behaviour=FAST):
    engine = SimulatedEngine(model, behaviour, Content(model, behaviour), alone=False)
    runner = web.ServerRunner(engine.server)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    async with aiohttp.ClientSession() as session:
        yield Door(session, f"http://127.0.0.1:{port}")
    await runner.cleanup()


def run(model, work, behaviour=FAST):
    async def main():
        async with door(model, behaviour) as engine:
            return await asyncio.wait_for(work(engine), 60)

    return asyncio.run(main())


def logps(answer):
    return [row[0] for row in answer["meta_info"]["output_token_logprobs"]]


def expected_logps(answer, *versions):
    """Of output tokens under the version of each of them."""
    ids = answer["output_ids"]
    per_token = [v for version, start, end in versions for v in [version] * (end - start)]
    assert len(per_token) == len(ids)
    return [
        simulated_logp(np.array([token]), np.array([len(PROMPT) + i]), version)[0].item()
        for i, (token, version) in enumerate(zip(ids, per_token, strict=True))
    ]


def spans(answer):
    return [(int(s["version"]), s["start"], s["end"]) for s in answer["meta_info"]["weight_versions"]]


def experts(answer):
    flat = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), "<i4")
    return flat.reshape(-1, 4, 2)


def expected_experts(content, answer, *versions):
    ids = np.array(PROMPT + answer["output_ids"])[:-1]
    return np.concatenate([content.experts(ids[start:end], version) for version, start, end in versions])


def test_samples_of_a_prompt_differ_and_other_engines_give_the_same_ones(served_model):
    async def work(engine):
        return await engine.generate(params={"n": 4})

    slow = replace(FAST, speedup=30, decode_tokens_s=60)
    first, second = run(served_model, work), run(served_model, work, slow)
    assert [a["output_ids"] for a in first] == [a["output_ids"] for a in second]
    assert len({tuple(a["output_ids"]) for a in first}) == 4


def test_scoring_agrees_with_sampling(served_model, content):
    async def work(engine):
        sampled = await engine.generate()
        ids = PROMPT + sampled["output_ids"]
        return sampled, await engine.generate(ids, params={"max_new_tokens": 0}, logprob_start_len=0)

    sampled, scored = run(served_model, work)
    rows = scored["meta_info"]["input_token_logprobs"]
    assert [row[1] for row in rows] == PROMPT + sampled["output_ids"]
    assert [row[0] for row in rows][len(PROMPT) :] == logps(sampled)
    assert rows[0][0] is None
    assert (experts(scored) == experts(sampled)).all()
    assert sampled["meta_info"]["finish_reason"] == {"type": "stop", "matched": END}
    assert scored["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_response_across_a_pause_has_the_tokens_of_each_version(served_model, content, mode):
    async def work(engine):
        undisturbed = await engine.generate(params={"n": 1})
        task = engine.begin([PROMPT])
        state = await engine.until(lambda s: s["sampled_tokens"] > 200 + 40)
        await engine.post("/pause_generation", {"mode": mode})
        state = await engine.post("/simulate")
        await engine.post("/update_weight_version", {"new_version": "1", "abort_all_requests": False})
        status, _ = await engine.call("POST", "/flush_cache")
        assert status == (200 if mode == "retract" else 400)
        await engine.post("/continue_generation")
        return undisturbed, state["sampled_tokens"] - 200, (await task)[0]

    undisturbed, cut, answer = run(served_model, work, replace(FAST, speedup=5))
    assert answer["output_ids"] == undisturbed["output_ids"]
    assert spans(answer) == [(0, 0, cut), (1, cut, 200)]
    assert logps(answer) == expected_logps(answer, *spans(answer))
    assert answer["meta_info"]["num_retractions"] == (mode == "retract")
    kept = 0 if mode == "retract" else len(PROMPT) + cut - 1
    rows = expected_experts(content, answer, (0, 0, kept), (1, kept, len(PROMPT) + 199))
    assert (experts(answer) == rows).all()


def test_a_pause_that_aborts_gives_back_what_another_request_goes_on_with(served_model):
    async def work(engine):
        undisturbed = await engine.generate(params={"n": 2})
        task = engine.begin(params={"n": 2})
        await engine.until(lambda s: s["sampled_tokens"] > 400 + 60)
        await engine.post("/pause_generation", {"mode": "abort"})
        partial = await task
        await engine.post("/update_weight_version", {"new_version": "1"})
        await engine.post("/continue_generation")
        prefixes = [PROMPT + answer["output_ids"] for answer in partial]
        return undisturbed, partial, await engine.generate(prefixes)

    undisturbed, partial, rest = run(served_model, work, replace(FAST, speedup=5))
    for whole, start, end in zip(undisturbed, partial, rest, strict=True):
        num = len(start["output_ids"])
        assert 0 < num < 200
        assert start["meta_info"]["finish_reason"]["type"] == "abort"
        assert spans(start) == [(0, 0, num)]
        assert len(experts(start)) == len(PROMPT) + num - 1
        assert start["output_ids"] + end["output_ids"] == whole["output_ids"]
        assert spans(end) == [(1, 0, 200 - num)]


def test_what_is_aborted_while_retracted_loses_its_newest_tokens(served_model):
    async def work(engine):
        task = engine.begin(rid="a")
        await engine.until(lambda s: s["sampled_tokens"] > 60)
        await engine.post("/pause_generation", {"mode": "retract"})
        await engine.post("/abort_request", {"rid": "a"})
        return await task

    answer = run(served_model, work, replace(FAST, speedup=5))
    assert len(answer["output_ids"]) in (50, 100, 150)
    assert "routed_experts" not in answer["meta_info"]
    assert answer["meta_info"]["finish_reason"] == {"type": "abort", "message": "Abort in waiting queue"}


def test_an_abort_means_every_id_that_begins_so_and_no_sample_of_several(served_model):
    async def work(engine):
        tasks = [engine.begin(rid="x"), engine.begin(rid="xy"), engine.begin(rid="y")]
        tasks.append(
            engine.begin(rid="z", params={"n": 2})
        )  # whose samples have hexadecimal names of their own
        await engine.until(lambda s: s["running"] == 5)
        await engine.post("/abort_request", {"rid": "x"})
        await engine.post("/abort_request", {"rid": "z"})
        return await asyncio.gather(*tasks)

    x, xy, y, z = run(served_model, work, replace(FAST, speedup=5))
    types = [one["meta_info"]["finish_reason"]["type"] for one in (x, xy, y, *z)]
    assert types == ["abort", "abort", "stop", "stop", "stop"]


def test_what_waits_for_a_pause_to_end_cannot_be_aborted(served_model):
    async def work(engine):
        await engine.post("/pause_generation", {"mode": "retract"})
        task = engine.begin(rid="a")
        await engine.until(lambda s: s["held_back"] == 1)
        await engine.post("/abort_request", {"rid": "a"})
        await engine.post("/abort_request", {"rid": "", "abort_all": True})
        await engine.post("/continue_generation")
        return await task

    assert run(served_model, work)["meta_info"]["finish_reason"]["type"] == "stop"


def test_a_client_that_goes_away_frees_its_places(served_model):
    async def work(engine):
        task = engine.begin(params={"n": 3})
        await engine.until(lambda s: s["running"] == 3)
        task.cancel()
        return await engine.until(lambda s: s["running"] == 0)

    assert run(served_model, work, replace(FAST, speedup=1))["aborted"] == 3


def test_weights_are_replaced_when_nothing_is_inside_or_in_a_pause(served_model):
    async def work(engine):
        task = engine.begin()
        await engine.until(lambda s: s["running"] == 1)
        update = {"model_path": str(served_model), "weight_version": "1"}
        await engine.post("/update_weights_from_disk", update)
        assert task.done() or (await engine.post("/simulate"))["running"] == 0
        first, second = await task, await engine.generate()
        await engine.post("/pause_generation", {"mode": "in_place"})
        await engine.post("/update_weights_from_disk", update | {"weight_version": "2"})
        info = (await engine.call("GET", "/model_info"))[1]
        return first, second, info

    first, second, info = run(served_model, work)
    assert [spans(first), spans(second)] == [[(0, 0, 200)], [(1, 0, 200)]]
    assert info["weight_version"] == "2"


def test_a_flush_waits_as_long_as_told(served_model):
    async def work(engine):
        task = engine.begin()
        await engine.until(lambda s: s["running"] == 1)
        refused = await engine.call("POST", "/flush_cache?timeout=0.01")
        flushed = await engine.call("POST", "/flush_cache?timeout=30")
        return refused[0], flushed[0], len((await task)["output_ids"])

    assert run(served_model, work) == (400, 200, 200)


def test_impossible_requests_are_refused(served_model):
    bad = {
        "input_ids cannot be empty": {"input_ids": []},
        "should be provided": {"text": "hello"},
        "must be at least 0": {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": -1}},
        "longer than the model's context length": {"input_ids": [1] * 2000},
        "maximum context length": {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2000}},
        "non-negative": {"input_ids": PROMPT, "sampling_params": {"temperature": -1}},
    }

    async def work(engine):
        return {complaint: await engine.call("POST", "/generate", body) for complaint, body in bad.items()}

    for complaint, (status, answer) in run(served_model, work).items():
        assert status == 400
        assert complaint in answer["error"]["message"]


def test_metrics_count_what_happens(served_model):
    async def work(engine):
        await engine.generate(params={"n": 2})
        return (await engine.call("GET", "/metrics"))[1], (await engine.call("GET", "/v1/loads"))[1]

    text, loads = run(served_model, work, replace(FAST, metrics=True))
    assert "sglang:num_running_reqs{" in text
    (tokens,) = [line for line in text.splitlines() if line.startswith("sglang:generation_tokens_total{")]
    assert float(tokens.split()[-1]) == 400
    assert loads["loads"][0]["decode_moments"][5] == pytest.approx(398)  # the prefills gave one each
    assert run(served_model, lambda engine: engine.call("GET", "/metrics"))[0] == 404


# ---- faults


def suffering(served_model, fault, work, behaviour=FAST):
    async def with_fault(engine):
        await engine.post("/simulate", fault)
        return await work(engine)

    return run(served_model, with_fault, behaviour)


@pytest.mark.parametrize("how", ["truncated", "length", "logprobs", "experts"])
def test_garbage_is_garbage_as_often_as_told(served_model, how):
    async def work(engine):
        body = {"input_ids": PROMPT, "return_logprob": True, "return_routed_experts": True}
        body["sampling_params"] = {"max_new_tokens": 5}
        async with engine.session.post(engine.url + "/generate", json=body) as answer:
            return await answer.text(), await engine.generate()

    first, good = suffering(served_model, {"fault": "garbage", "how": how, "times": 1}, work)
    assert len(logps(good)) == len(good["output_ids"])
    if how == "truncated":
        with pytest.raises(json.JSONDecodeError):
            json.loads(first)
        return
    meta = json.loads(first)["meta_info"]
    assert (len(meta["output_token_logprobs"]) < 5) == (how == "length")
    assert all(row[0] is None for row in meta["output_token_logprobs"]) == (how == "logprobs")
    assert ("routed_experts" not in meta) == (how == "experts")


def test_refusals_and_failures_have_their_path_status_and_probability(served_model):
    async def work(engine):
        statuses = [(await engine.call("GET", "/ready"))[0] for _ in range(200)]
        return statuses, (await engine.call("POST", "/generate", {}))[1]

    statuses, other = suffering(
        served_model, {"fault": "flaky", "path": "/ready", "status": 503, "probability": 0.3}, work
    )
    assert 30 < statuses.count(503) < 90
    assert "should be provided" in other["error"]["message"]
    refused = suffering(served_model, {"fault": "refuse", "times": 1}, lambda e: e.call("POST", "/generate"))
    assert refused[0] == 400
    with pytest.raises(AssertionError, match="heal or one of"):
        suffering(served_model, {"fault": "nonsense"}, lambda e: e.generate())


def test_a_hanging_engine_answers_everything_but_its_requests_until_it_is_healed(served_model):
    async def work(engine):
        task = engine.begin()
        for path in ("/health", "/model_info", "/v1/loads"):
            assert (await engine.call("GET", path))[0] == 200
        state = await engine.until(lambda s: s["waiting"] + s["running"] == 1)
        assert state["sampled_tokens"] == 0
        await engine.post("/simulate", {"fault": "heal"})
        return await task

    assert len(suffering(served_model, {"fault": "hang"}, work)["output_ids"]) == 200


def test_a_wrong_label_hides_the_weights_and_stale_weights_hide_behind_a_label(served_model):
    async def work(engine):
        await engine.post("/update_weight_version", {"new_version": "3"})
        return await engine.generate()

    wrong = suffering(served_model, {"fault": "wrong_version", "label": "0"}, work)
    assert spans(wrong) == [(0, 0, 200)]
    assert logps(wrong) == expected_logps(wrong, (3, 0, 200))
    stale = suffering(served_model, {"fault": "stale_weights"}, work)
    assert spans(stale) == [(3, 0, 200)]
    assert logps(stale) == expected_logps(stale, (0, 0, 200))


@pytest.mark.parametrize("fault", [{"fault": "drop"}, {"fault": "die"}, {"fault": "die", "after_tokens": 50}])
def test_a_lost_engine_closes_its_connections(served_model, fault):
    async def work(engine):
        with pytest.raises(aiohttp.ClientError):
            await engine.generate()
        state = await engine.post("/simulate", {"fault": "revive", "weight_version": "4"})
        assert not state["dead"]
        return await engine.generate()

    assert spans(suffering(served_model, fault, work)) == [(4, 0, 200)]


def test_a_silent_endpoint_never_answers(served_model):
    async def work(engine):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.call("GET", "/model_info"), 0.2)
        return await engine.generate()

    suffering(served_model, {"fault": "silent", "path": "/model_info"}, work)


def test_a_fault_strikes_so_many_times():
    faults = Faults(0)
    faults.add({"fault": "drop", "times": 2})
    assert [bool(faults.strike("drop", path="/generate")) for _ in range(3)] == [True, True, False]
    faults.add({"fault": "drop"})
    assert not faults.strike("drop", path="/health")
    faults.add({"fault": "heal"})
    assert not faults.active()


# ---- processes and weights


@pytest.fixture(scope="module")
def process(served_model, tmp_path_factory):
    behaviour = replace(FAST, speedup=5, text=False)
    server = SimulatedServer("e0", served_model, tmp_path_factory.mktemp("simulated") / "log", behaviour)
    asyncio.run(server.start())
    yield server
    asyncio.run(server.stop())


def fetch(url, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    ask = urllib.request.Request(url + path, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(ask, timeout=60) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()
    except urllib.error.HTTPError as err:
        text = err.read()
        return err.code, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory", "disk"])
def test_a_push_is_received_and_divides_responses_exactly(process, served_model, tmp_path, transport):
    tensors = load_file(served_model / "model.safetensors")
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    cfg = RolloutConfig(
        device="cpu", sync_transport=transport, sync_bucket_bytes=400_000, partial_rollouts="retract", sync_timeout_s=60,
        sync_directory=tmp_path if transport == "disk" else None,
    )  # fmt: skip
    sync, target = WeightSync(served_model, cfg, torch.device("cpu")), Target("e0", process.url)
    first = sync.push(iter(tensors.items()), 1, [target])  # connects, and takes longer
    assert not first.failures
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 200}, "return_logprob": True}
    answers = []
    sampling = threading.Thread(target=lambda: answers.append(fetch(process.url, "/generate", body)))
    before = process.state()
    sampling.start()
    while process.state()["sampled_tokens"] < before["sampled_tokens"] + 20:
        pass
    outcome = sync.push(iter(changed.items()), 2, [target])
    sampling.join()
    sync.close()

    assert not outcome.failures
    ((_, answer),) = answers
    (_, _, cut), _ = spans(answer)
    assert spans(answer) == [(1, 0, cut), (2, cut, 200)]
    assert logps(answer) == expected_logps(answer, *spans(answer))
    if transport != "disk":
        received = process.state()["received_bytes"] - before["received_bytes"]
        assert received == outcome.num_bytes == sum(t.nbytes for t in changed.values())
    _, report = fetch(process.url, "/weights_checker", {"action": "checksum"})
    assert report["ranks"][0]["checksums"] == {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] for name, tensor in changed.items()
    }
    assert outcome.digests == {"e0": f"tp1-ep1-dp1 {report['per_engine_checksum']}"}


def test_engines_of_one_process_are_ranks_of_one_group_and_die_alone(served_model, tmp_path):
    """Rank 0 is made with torch's own helper, as SGLang's side is."""
    name, weight = "several", torch.arange(10.0)
    bucket = {"names": ["w"], "dtypes": ["float32"], "shapes": [[10]], "group_name": name}

    async def main():
        async with SimulatedServers(3, served_model, tmp_path / "log", FAST) as servers:
            urls = [await engine.start() for engine in servers.engines]
            store = TCPStore("127.0.0.1", 0, 4, True, timedelta(seconds=30), False)
            invitation = {"master_address": "127.0.0.1", "master_port": store.port, "world_size": 4}
            invitation |= {"group_name": name, "backend": "gloo"}
            joined = [
                asyncio.to_thread(
                    fetch, url, "/init_weights_update_group", invitation | {"rank_offset": i + 1}
                )
                for i, url in enumerate(urls)
            ]
            joining = asyncio.gather(*joined)
            group, _ = await asyncio.to_thread(
                _new_process_group_helper, 4, 0, [], Backend("gloo"), PrefixStore(name, store),
                group_name=name, timeout=timedelta(seconds=30),
            )  # fmt: skip
            assert [status for status, _ in await joining] == [200] * 3
            for url in urls:
                assert fetch(url, "/begin_weight_update", {})[0] == 200
            updates = [
                asyncio.to_thread(fetch, url, "/update_weights_from_distributed", bucket) for url in urls
            ]
            updating = asyncio.gather(*updates)
            await asyncio.to_thread(
                lambda: group.broadcast([weight], torch.distributed.BroadcastOptions()).wait()
            )
            assert [status for status, _ in await updating] == [200] * 3
            digest = hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16]
            reports = [fetch(url, "/weights_checker", {})[1] for url in urls]
            assert {report["ranks"][0]["checksums"]["w"] for report in reports} == {digest}

            await servers.engines[0].stop()
            assert "simulated fault" in await servers.engines[0].death_report()
            assert await servers.engines[1].death_report() is None
            await servers.engines[0].start()
            assert await servers.engines[0].death_report() is None

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["freeze", "die"])
def test_an_engine_is_lost_in_the_bucket_that_is_named(served_model, fault):
    async def work(engine):
        await engine.post("/pause_generation", {"mode": "retract"})
        await engine.post("/begin_weight_update")
        bucket = {"names": ["w"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "none"}
        assert (await engine.call("POST", "/update_weights_from_distributed", bucket))[0] == 400
        second = engine.call("POST", "/update_weights_from_distributed", bucket)
        if fault == "die":
            with pytest.raises(aiohttp.ClientError):
                await second
            return
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second, 0.3)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.post("/continue_generation"), 0.3)
        assert (await engine.call("GET", "/model_info"))[0] == 200

    suffering(served_model, {"fault": fault, "bucket": 2}, work)


def test_a_process_dies_as_told_says_how_and_starts_again(served_model, tmp_path):
    async def main():
        async with SimulatedServer("e", served_model, tmp_path / "log", FAST) as server:
            assert await server.death_report() is None
            server.suffer("die")
            async with asyncio.timeout(10):
                while (report := await server.death_report()) is None:
                    await asyncio.sleep(0.01)
            assert "killed by SIGKILL" in report
            server.behaviour = replace(FAST, weight_version="5")
            await server.start()
            assert fetch(server.url, "/model_info")[1]["weight_version"] == "5"
            os.killpg(server.pid, signal.SIGSTOP)  # a stopped process ends too

    asyncio.run(main())


def test_a_process_that_cannot_start_says_why(served_model, tmp_path):
    server = SimulatedServer("e", served_model, tmp_path / "log", replace(FAST, lengths="nonsense"))
    with pytest.raises(Exception, match="expected fixed:N"):
        asyncio.run(server.start())


def test_a_process_ends_with_its_parent(served_model, tmp_path):
    script = f"""
        import asyncio, os
        from pathlib import Path
        from megatron_vespo.rollout.simulated_engine import SimulatedServer
        server = SimulatedServer("e", Path({str(served_model)!r}), Path({str(tmp_path / "log")!r}))
        print(asyncio.run(server.start()), flush=True)
        os._exit(0)
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    url = child.stdout.strip()
    assert url.startswith("http://"), child.stderr
    with pytest.raises(OSError):
        for _ in range(1000):
            fetch(url, "/ready")


# ---- the same requests to the real server


def shape(value):
    """Keys, types and lengths of a JSON value; experts by their number."""
    if isinstance(value, dict):
        return {
            key: len(base64.b64decode(item)) if key == "routed_experts" else shape(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


LENGTH = {"max_new_tokens": 3, "ignore_eos": True}
WITH_ALL = {"return_logprob": True, "return_routed_experts": True, "sampling_params": LENGTH}
BODIES = {
    "one": {"input_ids": PROMPT, **WITH_ALL},
    "named": {"input_ids": PROMPT, **WITH_ALL, "rid": "a-name"},
    "plain": {"input_ids": PROMPT, "sampling_params": LENGTH},
    "samples": {"input_ids": PROMPT, **WITH_ALL, "sampling_params": {**LENGTH, "n": 3}},
    "batch": {"input_ids": [PROMPT, OTHER], **WITH_ALL},
    "batch of one": {"input_ids": [PROMPT], **WITH_ALL},
    "batch of samples": {"input_ids": [PROMPT, OTHER], **WITH_ALL, "sampling_params": {**LENGTH, "n": 2}},
    "own parameters": {
        "input_ids": [PROMPT, OTHER], **WITH_ALL, "rid": ["x", "y"],
        "sampling_params": [{"max_new_tokens": 2, "ignore_eos": True}, LENGTH],
    },
    "scored": {
        "input_ids": [*range(264)], **WITH_ALL, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 0},
    },
    "scored partly": {
        "input_ids": PROMPT, **WITH_ALL, "logprob_start_len": 3, "routed_experts_start_len": 4,
        "sampling_params": {"max_new_tokens": 0},
    },
    "rest of the experts": {"input_ids": PROMPT, **WITH_ALL, "routed_experts_start_len": 6},
    "candidates": {
        "input_ids": [PROMPT, OTHER], "return_logprob": True, "token_ids_logprob": [[5], [6]],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.5, "ignore_eos": True},
    },
    "nothing": {"input_ids": []},
    "too long": {"input_ids": [1] * 1200},
    "too many": {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 5000}},
    "negative": {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": -1}},
}  # fmt: skip


@pytest.fixture
def both(sglang_server, served_model, tmp_path):
    behaviour = Behaviour(metrics=False, decode_tokens_s=60)
    server = SimulatedServer("e", served_model, tmp_path / "log", behaviour)
    asyncio.run(server.start())
    yield sglang_server.url, server.url
    asyncio.run(server.stop())


def test_answers_have_the_shape_of_the_real_servers(both):
    for name, body in BODIES.items():
        (real_status, real), (status, simulated) = (fetch(url, "/generate", body) for url in both)
        assert status == real_status, name
        assert shape(simulated) == shape(real), name
        if name.startswith("scored"):
            rows, real_rows = (x["meta_info"]["input_token_logprobs"] for x in (simulated, real))
            assert [row[1] for row in rows] == [row[1] for row in real_rows], name


def test_it_says_of_itself_what_the_real_server_says(both):
    for path in ("/model_info", "/server_info"):
        (_, real), (_, simulated) = (fetch(url, path) for url in both)
        assert simulated.keys() <= real.keys()
        same = {key: shape(real[key]) for key in simulated if key != "internal_states"}
        assert {key: shape(simulated[key]) for key in same} == same
    (_, real), (_, simulated) = (fetch(url, "/v1/loads") for url in both)
    assert shape(simulated) | {"loads": 0} == shape(real) | {"loads": 0}
    assert simulated["loads"][0].keys() == real["loads"][0].keys()
    (_, real), (_, simulated) = (fetch(url, "/weights_checker", {"action": "checksum"}) for url in both)
    (rank,), (real_rank,) = simulated.pop("ranks"), real.pop("ranks")
    assert shape(simulated) == shape(real)
    unfused = rank.pop("checksums").items()
    assert {(name, digest) for name, digest in real_rank.pop("checksums").items() if "norm" in name} <= set(
        unfused
    )
    assert shape(rank) == shape(real_rank)


def test_control_calls_are_answered_and_refused_as_by_the_real_server(both):
    bucket = {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "none"}
    calls = [
        ("/end_weight_update", {}),
        ("/update_weights_from_distributed", bucket),
        ("/begin_weight_update", {}),
        ("/begin_weight_update", {}),
        ("/update_weights_from_distributed", bucket),
        ("/end_weight_update", {}),
        ("/destroy_weights_update_group", {"group_name": "none"}),
        ("/pause_generation", {"mode": "retract"}),
        ("/ready", None),
        ("/flush_cache", {}),
        ("/continue_generation", {}),
        ("/ready", None),
        ("/update_weight_version", {"new_version": "0", "abort_all_requests": False}),
        ("/abort_request", {"rid": "nobody"}),
        ("/abort_request", {"rid": "", "abort_all": True}),
        ("/begin_weight_update", None),
        ("/nothing", None),
        ("/metrics", None),
    ]
    for path, body in calls:
        real, simulated = (fetch(url, path, body) for url in both)
        assert simulated == real, path


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_pauses_do_what_the_real_servers_do(both, mode):
    """One request begun before the pause and one while it lasts, in which the version changes."""

    def life(url):
        body = {**BODIES["one"], "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
        answers = {}

        def ask(rid):
            answers[rid] = fetch(url, "/generate", body | {"rid": rid})[1]

        threads = [threading.Thread(target=ask, args=(rid,)) for rid in ("old", "new")]
        threads[0].start()
        while fetch(url, "/v1/loads")[1]["loads"][0]["num_used_tokens"] < len(PROMPT) + 20:
            pass
        statuses = [fetch(url, "/pause_generation", {"mode": mode})[0]]
        threads[1].start()
        statuses.append(fetch(url, "/flush_cache", {}) if mode != "abort" else None)
        version = {"new_version": "1", "abort_all_requests": False}
        statuses.append(fetch(url, "/update_weight_version", version)[0])
        statuses.append(fetch(url, "/continue_generation", {})[0])
        for thread in threads:
            thread.join()
        fetch(url, "/update_weight_version", version | {"new_version": "0"})
        old, new = answers["old"]["meta_info"], answers["new"]["meta_info"]
        return {
            "statuses": statuses,
            "keys": [old.keys(), new.keys()],
            "reasons": [old["finish_reason"]["type"], new["finish_reason"]["type"]],
            "versions": [[span["version"] for span in meta["weight_versions"]] for meta in (old, new)],
            "retractions": [old["num_retractions"], new["num_retractions"]],
            "rows": [experts({"meta_info": m}).shape[0] - m["completion_tokens"] for m in (old, new)],
            "covered": [m["weight_versions"][-1]["end"] == m["completion_tokens"] for m in (old, new)],
        }

    real, simulated = (life(url) for url in both)
    assert simulated == real
    assert real["versions"][0] == (["0"] if mode == "abort" else ["0", "1"])
