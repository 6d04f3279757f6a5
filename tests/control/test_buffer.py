"""The staleness bound as a property, against a trainer and producers of arbitrary speed."""

import asyncio

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.control.buffer import GroupBuffer
from megatron_vespo.types import Group, Prompt, Response, Rollout, VersionSpan

NOBODY = np.zeros(1, np.int32)


def group(index: int, version: int) -> Group:
    response = Response(
        token_ids=NOBODY, text="", behavior_logp=np.zeros(1, np.float32), experts=None, finish_reason="stop",
        spans=(VersionSpan(version=version, start=0, end=1),),
    )  # fmt: skip
    prompt = Prompt(uid=str(index), token_ids=NOBODY, text="", answer="")
    return Group(rollouts=(Rollout(prompt=prompt, response=response, reward=0, advantage=0),) * 2)


async def run(
    per_step: int, max_staleness: int, delays: list[int], num_steps: int
) -> tuple[list[int], list[int]]:
    """Simulate; -> staleness of every group taken, and the admission index in the order of training."""
    buffer = GroupBuffer(prompts_per_step=per_step, max_staleness=max_staleness)
    served, admitted = 0, iter(range(10**6))

    async def produce() -> None:
        while True:
            ticket = await buffer.admit()
            index, version = next(admitted), served
            for _ in range(delays[index % len(delays)]):
                await asyncio.sleep(0)
            await buffer.fill(ticket, group(index, version))

    producers = [asyncio.create_task(produce()) for _ in range(buffer.capacity)]
    staleness, order = [], []
    for version in range(num_steps):
        groups = await asyncio.wait_for(buffer.take(), 20)
        staleness += [version - int(g.rollouts[0].response.versions[0]) for g in groups]
        order += [int(g.rollouts[0].prompt.uid) for g in groups]
        await asyncio.sleep(0)
        served = version + 1
        await buffer.release()
    for producer in producers:
        producer.cancel()
    return staleness, order


@given(
    per_step=st.integers(1, 5),
    max_staleness=st.integers(0, 4),
    delays=st.lists(st.integers(0, 30), min_size=1, max_size=12),
)
@settings(max_examples=80, deadline=None)
def test_no_group_is_older_than_the_bound_and_none_is_lost_or_overtaken(per_step, max_staleness, delays):
    staleness, order = asyncio.run(run(per_step, max_staleness, delays, num_steps=12))
    assert max(staleness) <= max_staleness
    assert order == list(range(12 * per_step))


def test_the_bound_is_reached_so_sampling_does_run_ahead():
    for bound in (0, 1, 3):
        staleness, _ = asyncio.run(run(per_step=2, max_staleness=bound, delays=[0], num_steps=12))
        assert max(staleness) == bound


def test_a_closed_buffer_ends_a_wait_at_once():
    async def scenario() -> list[Group]:
        buffer = GroupBuffer(prompts_per_step=1, max_staleness=0)
        waiting = asyncio.create_task(buffer.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        await buffer.close()
        return await asyncio.wait_for(waiting, 1)

    assert asyncio.run(scenario()) == []


def test_progress_says_what_is_missing():
    async def scenario() -> str:
        buffer = GroupBuffer(prompts_per_step=2, max_staleness=1)
        first = await buffer.admit()
        await buffer.admit()
        await buffer.admit()
        await buffer.fill(first, group(0, 0))
        return buffer.progress()

    assert asyncio.run(scenario()) == "1 of 2 groups, 3 being sampled or queued"
