"""The staleness bound as a property, against a trainer and producers of arbitrary speed."""

import asyncio
from dataclasses import dataclass, field

import numpy as np
import pytest
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
    return Group(
        rollouts=(Rollout(prompt=prompt, response=response, reward=0, advantage=0),) * 2, ordinal=index
    )


@dataclass
class Seen:
    staleness: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    expired: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    overtaken: int = 0


async def run(buffer: GroupBuffer, delays: list[int], num_steps: int, drops: list[bool]) -> Seen:
    """Producers that need delays[index] turns of the event loop and drop a group where drops[index]; both cycle."""
    served, stream, again, seen = 0, iter(range(10**6)), list[int](), Seen()

    async def produce() -> None:
        while True:
            ticket = await buffer.admit()
            index, version = again.pop(0) if again else next(stream), served
            ticket.ordinal = index
            for _ in range(delays[index % len(delays)]):
                await asyncio.sleep(0)
            if drops[index % len(drops)]:
                if buffer.drop(ticket):
                    seen.dropped.append(index)
            else:
                buffer.fill(ticket, group(index, version))

    producers = [asyncio.create_task(produce()) for _ in range(buffer.capacity)]
    for version in range(num_steps):
        groups = await asyncio.wait_for(buffer.take(), 20)
        assert len(groups) == buffer.prompts_per_step
        assert buffer.num_alive <= buffer.capacity
        seen.overtaken += buffer.num_overtaken
        seen.staleness += [version - int(g.rollouts[0].response.versions[0]) for g in groups]
        seen.order += [g.ordinal for g in groups]
        await asyncio.sleep(0)
        served = version + 1
        expired = [ticket.ordinal for ticket in buffer.release()]
        again.extend(expired)
        seen.expired += expired
    for producer in producers:
        producer.cancel()
    return seen


PER_STEP, STALENESS = st.integers(1, 5), st.integers(0, 4)
DELAYS = st.lists(st.integers(0, 30), min_size=1, max_size=12)
DROPS = st.lists(st.booleans(), min_size=1, max_size=7).map(lambda drops: [*drops, False])


@given(PER_STEP, STALENESS, DELAYS)
@settings(max_examples=80, deadline=None)
def test_no_group_is_older_than_the_bound_and_none_is_lost_or_overtaken(per_step, bound, delays):
    buffer = GroupBuffer(prompts_per_step=per_step, max_staleness=bound)
    seen = asyncio.run(run(buffer, delays, 12, [False]))
    assert max(seen.staleness) <= bound
    assert seen.order == list(range(12 * per_step))
    assert seen.overtaken == 0 and not seen.expired


@given(PER_STEP, STALENESS, st.integers(0, 20), DELAYS, DROPS)
@settings(max_examples=150, deadline=None)
def test_with_a_window_and_dropped_groups_the_bound_holds_and_nothing_expires(
    per_step, bound, window, delays, drops
):
    buffer = GroupBuffer(prompts_per_step=per_step, max_staleness=bound, window=window)
    seen = asyncio.run(run(buffer, delays, 12, drops))
    assert max(seen.staleness) <= bound
    assert len(set(seen.order)) == len(seen.order), "a group was trained twice"
    assert not set(seen.order) & set(seen.dropped)
    assert not seen.expired
    lost = set(range(max(seen.order) + 1)) - set(seen.order) - set(seen.dropped)
    assert len(lost) < buffer.capacity, "more are missing than can be under way"


@given(PER_STEP, STALENESS, st.integers(0, 20), DELAYS, DROPS, st.floats(1, 3))
@settings(max_examples=150, deadline=None)
def test_oversampled_groups_that_become_too_old_are_given_back_and_trained_later(
    per_step, bound, window, delays, drops, factor
):
    buffer = GroupBuffer(prompts_per_step=per_step, max_staleness=bound, window=window, oversampling=factor)
    seen = asyncio.run(run(buffer, delays, 12, drops))
    assert max(seen.staleness) <= bound
    assert len(set(seen.order)) == len(seen.order)
    missing = set(range(max(seen.order) + 1)) - set(seen.order) - set(seen.dropped)
    assert len(missing) <= buffer.capacity + len(set(seen.expired))


def test_the_bound_is_reached_so_sampling_does_run_ahead():
    for bound in (0, 1, 3):
        seen = asyncio.run(run(GroupBuffer(prompts_per_step=2, max_staleness=bound), [0], 12, [False]))
        assert max(seen.staleness) == bound


def test_oversampling_expires_what_filtering_did_not_use():
    """S = 0, P = 2, 4 admitted, none dropped: of each batch 2 are left over, and sampled again for the next one."""
    buffer = GroupBuffer(prompts_per_step=2, max_staleness=0, oversampling=2.0)
    seen = asyncio.run(run(buffer, [0], 3, [False]))
    assert seen.order == [0, 1, 2, 3, 4, 5]
    assert seen.expired == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("window", "expected"), [(0, None), (1, [1, 2]), (5, [1, 2])])
def test_a_window_lets_finished_groups_overtake_the_unfinished_head(window, expected):
    async def scenario():
        buffer = GroupBuffer(prompts_per_step=2, max_staleness=1, window=window)
        tickets = [await buffer.admit() for _ in range(4)]
        for index in (1, 2, 3):
            buffer.fill(tickets[index], group(index, 0))
        if expected is None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(buffer.take(), 0.01)
            return
        assert [g.ordinal for g in await buffer.take()] == expected
        assert buffer.num_overtaken == 1
        buffer.release()
        # The head, admitted under version 0, must be trained on top of version 1 now: nothing overtakes it again.
        more = [await buffer.admit() for _ in range(2)]
        for index, ticket in enumerate(more, start=4):
            buffer.fill(ticket, group(index, 1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(buffer.take(), 0.01)
        buffer.fill(tickets[0], group(0, 0))
        assert [g.ordinal for g in await buffer.take()] == [0, 3]

    asyncio.run(scenario())


def test_a_closed_buffer_ends_a_wait_at_once():
    async def scenario() -> list[Group]:
        buffer = GroupBuffer(prompts_per_step=1, max_staleness=0)
        waiting = asyncio.create_task(buffer.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        buffer.close()
        return await asyncio.wait_for(waiting, 1)

    assert asyncio.run(scenario()) == []


def test_progress_says_what_is_missing():
    async def scenario() -> str:
        buffer = GroupBuffer(prompts_per_step=2, max_staleness=1)
        first = await buffer.admit()
        await buffer.admit()
        await buffer.admit()
        buffer.fill(first, group(0, 0))
        return buffer.progress()

    assert asyncio.run(scenario()) == "1 of 2 groups, 3 being sampled or queued"
