"""Signals, causes and waits: real signals to this process, real event loops."""

import asyncio
import logging
import os
import signal

import pytest

from megatron_vespo.control import clock, session
from megatron_vespo.types import Interrupted, RunError


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_at_once_after_cleaning_up(number):
    cleaned = []

    async def main(stop: session.Stop) -> None:
        try:
            send(number)
            await asyncio.sleep(60)
        finally:
            cleaned.append(True)

    with pytest.raises(Interrupted, match="stopped at once"):
        session.run(main, print)
    assert cleaned


def test_the_first_signal_during_a_step_is_gentle_and_the_second_is_not():
    told: list[str] = []

    async def gentle(stop: session.Stop) -> str:
        asked = asyncio.Event()
        stop.gently = asked.set
        send(signal.SIGINT)
        await asyncio.wait_for(asked.wait(), 5)
        return "the step ended"

    assert session.run(gentle, told.append) == "the step ended"
    assert "SIGINT: ending after the step in progress" in told[0]

    async def impatient(stop: session.Stop) -> None:
        stop.gently = lambda: send(signal.SIGINT)
        send(signal.SIGINT)
        await asyncio.sleep(60)

    with pytest.raises(Interrupted):
        session.run(impatient, told.append)


def test_of_many_failures_the_one_that_explains_is_raised():
    async def fail(error: Exception) -> None:
        raise error

    async def main(stop: session.Stop) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail(ValueError("an echo")))
            tasks.create_task(fail(RunError("engine = dead: look at its log")))

    with pytest.raises(RunError, match="engine = dead"):
        session.run(main, print)


def test_a_wait_tells_what_it_waits_for_and_ends_at_its_deadline(monkeypatch, caplog):
    monkeypatch.setattr(clock, "_REMIND_S", 0.05)
    cancelled = []

    async def hang() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def main() -> None:
        await clock.bounded(hang(), lambda: "ranks (2 of 4)", deadline_s=0.2, limit="trainer.call_timeout_s")

    with caplog.at_level(logging.WARNING), pytest.raises(RunError) as caught:
        asyncio.run(main())
    assert "ranks (2 of 4) = not done after 0.2 s: expected within trainer.call_timeout_s = 0.2" in str(
        caught.value
    )
    assert any("ranks (2 of 4): waited" in record.getMessage() for record in caplog.records)
    assert cancelled
