"""The verifier: what counts as equal, and that nothing a model writes can stop it or outlive it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_vespo.data import verifiers
from megatron_vespo.data.verifiers import MathVerifier
from megatron_vespo.types import Prompt, Response, RunError, VersionSpan

TOWER = "\\boxed{10^{10^{10}}}"


def prompt(answer: str) -> Prompt:
    return Prompt(uid="u", token_ids=np.zeros(1, np.int32), text="", answer=answer)


def response(text: str, finish_reason: str = "stop") -> Response:
    return Response(
        token_ids=np.zeros(1, np.int32),
        text=text,
        behavior_logp=np.zeros(1, np.float32),
        spans=(VersionSpan(version=0, start=0, end=1),),
        experts=None,
        finish_reason=finish_reason,
    )


def score(verifier: MathVerifier, answer: str, *texts: str) -> tuple[float, ...]:
    return asyncio.run(verifier.score(prompt(answer), [response(text) for text in texts]))


def workers(verifier: MathVerifier) -> list[int]:
    return [worker._process.pid for worker in verifier._workers if worker._process is not None]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    verifier = MathVerifier(timeout_s=20, num_processes=1)
    yield verifier
    verifier.close()


@pytest.fixture(scope="module")
def impatient() -> Iterator[MathVerifier]:
    verifier = MathVerifier(timeout_s=2, num_processes=1)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("34", "We add $30$ and $4$.\n\nAnswer: \\boxed{34}", 1.0),
        ("34", "Therefore, the final answer is $34$.", 1.0),
        ("34", "<think>35?</think> \\boxed{34}<|im_end|>", 1.0),
        ("34", "The final answer is $35$; no, \\boxed{34}", 1.0),
        ("34", "\\boxed{35}", 0.0),
        ("34", "\\boxed{34", 0.0),
        ("34", "", 0.0),
        ("34", "I do not know.", 0.0),
        ("7", "\\boxed{3} or \\boxed{7}", 0.0),
        ("-3", "\\boxed{-3}", 1.0),
        ("1000", "\\boxed{1,000}", 1.0),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1.0),
        ("\\frac{1}{2}", "\\[ x = \\boxed{\\dfrac{2}{4}} \\]", 1.0),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{3}}", 0.0),
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", 1.0),
        ("34", "\\boxed{34}\n{\"a\": \"b\"}\r\u2028 \ud800 \x00", 1.0),
    ],
)  # fmt: skip
def test_rewards_of_real_looking_responses(verifier, answer, text, reward):
    assert score(verifier, answer, text) == (reward,)


def test_a_response_cut_by_its_length_is_scored_on_its_text(verifier):
    cut = [response("\\boxed{34} and more", "length"), response("\\boxed{3", "length")]
    assert asyncio.run(verifier.score(prompt("34"), cut)) == (1.0, 0.0)


def test_rewards_come_in_the_order_of_the_responses(verifier):
    assert score(verifier, "7", "\\boxed{8}", "\\boxed{7}", "\\boxed{8}", "7", "\\boxed{7}") == (
        0,
        1,
        0,
        1,
        1,
    )
    assert score(verifier, "7") == ()


def test_a_tiny_answer_takes_less_than_5_ms_of_processor_time(verifier):
    score(verifier, "7", "\\boxed{7}")  # a worker is up
    (pid,) = workers(verifier)
    before = processor_time_s(pid)
    assert sum(score(verifier, "7", *[f"\\boxed{{{i}}}" for i in range(100)])) == 1
    assert processor_time_s(pid) - before < 0.5  # well above 200 a second on an idle machine


def processor_time_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def test_a_response_that_never_ends_is_worth_nothing_and_the_next_is_judged():
    verifier = MathVerifier(timeout_s=1, num_processes=1)
    try:
        assert score(verifier, "7", "\\boxed{7}") == (1.0,)
        (first,) = workers(verifier)
        began = time.monotonic()
        # equal texts are verified once: one deadline, not two
        assert score(verifier, "7", TOWER, "\\boxed{7}", TOWER) == (0, 1, 0)
        assert time.monotonic() - began < 20  # the deadline, and the start of another worker
        assert (verifier.num_timeouts, verifier.num_deaths) == (1, 0)
        assert not alive(first)
    finally:
        verifier.close()


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 15_000,
        "7" * 100_000,
        "$" * 100_000,
        "\\boxed{" + "\\frac{1}{" * 2000 + "2" + "}" * 2000 + "}",
        "$" + "(" * 3000 + "7" + ")" * 3000 + "$",
        bytes(range(256)).decode("latin-1") * 400,
    ],
    ids=["boxes", "digits", "dollars", "fractions", "brackets", "bytes"],
)
def test_garbage_of_100_kb_ends_within_the_deadline(impatient, text):
    score(impatient, "7", "\\boxed{7}")  # a worker is up
    began = time.monotonic()
    assert score(impatient, "7", text) == (0.0,)
    assert time.monotonic() - began < 10


def test_the_event_loop_runs_on_while_a_response_is_judged():
    verifier = MathVerifier(timeout_s=1, num_processes=1)

    async def main() -> int:
        job = asyncio.create_task(verifier.score(prompt("7"), [response(TOWER)]))
        ticks = 0
        while not job.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    try:
        assert asyncio.run(main()) > 10
    finally:
        verifier.close()


def test_a_killed_worker_is_replaced():
    verifier = MathVerifier(timeout_s=20, num_processes=2)
    try:
        assert score(verifier, "7", "\\boxed{7}", "\\boxed{8}") == (1, 0)
        for pid in workers(verifier):
            os.kill(pid, signal.SIGKILL)
        rewards = score(verifier, "7", "\\boxed{7}", "\\boxed{07}")
        assert verifier.num_deaths == rewards.count(0.0) > 0
        assert score(verifier, "7", "\\boxed{7}", "\\boxed{07}") == (1, 1)
    finally:
        verifier.close()


def test_workers_that_always_die_stop_the_run(monkeypatch, tmp_path):
    fatal = tmp_path / "fatal.py"
    fatal.write_text("import sys\nprint('ready', flush=True)\nsys.stdin.readline()\nsys.exit(1)\n")
    monkeypatch.setattr(verifiers, "WORKER", fatal)
    verifier = MathVerifier(timeout_s=20, num_processes=2)
    try:
        assert score(verifier, "7", *"123") == (0, 0, 0)
        with pytest.raises(RunError, match="verifier worker deaths = 16 in a row"):
            score(verifier, "7", *"0123456789abcdef")
    finally:
        verifier.close()


def test_a_worker_that_cannot_start_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    monkeypatch.setattr(verifiers, "WORKER", broken)
    verifier = MathVerifier(timeout_s=20, num_processes=1)
    try:
        with pytest.raises(RunError, match=r"(?s)in 3 attempts.*No module named 'no_such_module'"):
            score(verifier, "7", "\\boxed{7}")
    finally:
        verifier.close()


def test_closing_leaves_no_process_even_while_a_response_is_judged():
    verifier = MathVerifier(timeout_s=60, num_processes=2)
    score(verifier, "7", "\\boxed{7}", "\\boxed{8}")
    pids = workers(verifier)
    assert len(pids) == 2

    async def main() -> None:
        job = asyncio.create_task(verifier.score(prompt("7"), [response(TOWER)]))
        await asyncio.sleep(0.2)
        verifier.close()
        with pytest.raises(RunError, match="closed"):
            await asyncio.wait_for(job, 5)

    asyncio.run(main())
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(RunError, match="verifier = closed"):
        score(verifier, "7", "\\boxed{7}")
    verifier.close()


def test_workers_end_with_their_parent_even_if_it_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, os, signal\n"
        "from tests.data.test_verifiers import prompt, response, workers, MathVerifier, TOWER\n"
        "verifier = MathVerifier(timeout_s=60, num_processes=1)\n"
        "async def main():\n"
        "    await verifier.score(prompt('7'), [response('7')])\n"
        "    job = asyncio.create_task(verifier.score(prompt('7'), [response(TOWER)]))\n"
        "    await asyncio.sleep(0.2)\n"
        "    os.write(1, b'%d' % workers(verifier)[0])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    root = str(Path(__file__).parents[2])
    out = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": root}, capture_output=True, timeout=60
    )
    pid = int(out.stdout)
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
