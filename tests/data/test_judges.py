"""Judges: nothing that a model writes, a user's function does or a server answers can stop a run, or outlive it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from megatron_vespo.config import ConfigError, RewardConfig
from megatron_vespo.data import judges
from megatron_vespo.data.judges import HttpJudge, WorkerPool
from megatron_vespo.data.verifiers import TextVerifier, make_verifier
from megatron_vespo.types import RunError
from tests.data.test_verifiers import prompt, response

TOWER = "\\boxed{10^{10^{10}}}"

REWARDS = '''
import ctypes, os, subprocess, sys, time, asyncio
from neighbour import SEVEN

print("noise of the import", flush=True)

def judge(prompt, response, answer):
    """What a response can do to its judge, by what it says."""
    print("noise", flush=True)
    os.write(1, b'{"ready": true}\\n0.125\\n')
    subprocess.run(["echo", "more noise"])
    if response == "hang in C":
        ctypes.CDLL(None).pause()
    if response == "hang with a child":
        child = subprocess.Popen(["sleep", "600"])
        open(answer, "w").write(str(child.pid))
        time.sleep(600)
    if response == "die":
        os.kill(os.getpid(), 11)
    if response == "die once" and not os.path.exists(answer):
        open(answer, "w").close()
        os._exit(1)
    if response == "exit":
        sys.exit(3)
    if response == "read stdin":
        sys.stdin.read()
    if response == "raise":
        raise KeyError("no such thing")
    if response == "nan":
        return float("nan")
    if response == "text":
        return "1.0"
    if response == "context":
        return (prompt == "<question>") + 2 * (answer == SEVEN)
    return float(response)

calls = []

async def judge_async(prompt, response, answer):
    calls.append(asyncio.get_running_loop())
    await asyncio.sleep(0)
    return len(set(calls)) + float(response)

def of_one(response):
    return 0.0

half_done = 1
'''


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("SEVEN = '7'\n")
    (tmp_path / "math.py").write_text(REWARDS)  # a name that must not shadow the standard library's
    return tmp_path / "math.py"


def function(target: str, timeout_s: float = 30, num_processes: int = 1) -> TextVerifier:
    cfg = RewardConfig(
        verifier="function",
        function=target,
        timeout_s=timeout_s,
        num_processes=num_processes,
        failure_reward=-1,
    )
    return make_verifier(cfg)


async def score(verifier: TextVerifier, answer: str, *texts: str) -> tuple[float, ...]:
    return await verifier.score(prompt(answer), [response(text) for text in texts])


def run(verifier: TextVerifier, story: Callable[[TextVerifier], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(120), verifier:
            await story(verifier)

    asyncio.run(main())


def workers(verifier: TextVerifier) -> list[int]:
    pool = verifier._judge
    assert isinstance(pool, WorkerPool)
    return [worker._process.pid for worker in pool._workers if worker._process is not None]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


async def gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while alive(pid):
            await asyncio.sleep(0.01)


def test_a_function_in_a_file_is_given_prompt_response_and_answer(rewards):
    async def story(verifier: TextVerifier) -> None:
        assert await score(verifier, "7", "0.5", "context", "-3") == (0.5, 3.0, -3.0)

    run(function(f"{rewards}:judge"), story)


def test_an_async_function_runs_in_one_loop_and_a_module_is_found_on_our_path(rewards, monkeypatch):
    (rewards.parent / "package").mkdir()
    for name, text in {"my_rewards": REWARDS, "neighbour": "SEVEN = '7'\n"}.items():
        (rewards.parent / "package" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(rewards.parent / "package"))

    async def story(verifier: TextVerifier) -> None:
        assert await score(verifier, "7", "0", "1", "2") == (1.0, 2.0, 3.0)

    run(function("my_rewards:judge_async"), story)


def test_prints_input_and_children_of_a_function_do_not_reach_the_channel(rewards):
    async def story(verifier: TextVerifier) -> None:
        assert await score(verifier, "7", "0.5", "read stdin", "0.25") == (0.5, -1.0, 0.25)
        assert verifier.failures == {
            "timeouts": 0,
            "deaths": 0,
            "errors": 1,
        }  # stdin was empty, its text no number

    run(function(f"{rewards}:judge"), story)


def test_a_function_that_raises_or_gives_no_number_fails_one_response_and_keeps_its_worker(rewards, caplog):
    async def story(verifier: TextVerifier) -> None:
        before = workers(verifier)
        assert await score(verifier, "7", "raise", "1", "nan", "text") == (-1, 1, -1, -1)
        assert verifier.failures == {"timeouts": 0, "deaths": 0, "errors": 3}
        assert workers(verifier) == before

    run(function(f"{rewards}:judge"), story)
    assert "KeyError: 'no such thing'" in caplog.text and "math.py" in caplog.text


def test_a_worker_that_hangs_in_c_code_or_dies_is_replaced(rewards):
    async def story(verifier: TextVerifier) -> None:
        (first,) = workers(verifier)
        assert await score(verifier, "7", "hang in C", "1", "die", "2", "exit", "3") == (-1, 1, -1, 2, -1, 3)
        assert verifier.failures == {"timeouts": 1, "deaths": 2, "errors": 0}
        await gone(first)

    run(function(f"{rewards}:judge", timeout_s=0.5), story)


def test_what_a_late_worker_started_is_killed_with_it(rewards, tmp_path):
    async def story(verifier: TextVerifier) -> None:
        note = tmp_path / "child"
        assert await score(verifier, str(note), "hang with a child") == (-1,)
        await gone(int(note.read_text()))

    run(function(f"{rewards}:judge", timeout_s=0.5), story)


def test_a_response_whose_worker_is_killed_from_outside_is_judged_by_another(rewards, tmp_path):
    async def story(verifier: TextVerifier) -> None:
        os.kill(workers(verifier)[0], signal.SIGKILL)  # while it is idle
        assert await score(verifier, "7", "1", "2", "3") == (1, 2, 3)
        assert await score(verifier, str(tmp_path / "once"), "die once") == (-1,)  # judged: it is no number
        assert verifier.failures == {"timeouts": 0, "deaths": 0, "errors": 1}

    run(function(f"{rewards}:judge", num_processes=2), story)


def test_a_stopped_worker_costs_a_deadline_even_if_the_response_does_not_fit_its_pipe(rewards):
    async def story(verifier: TextVerifier) -> None:
        (stopped,) = workers(verifier)
        os.kill(stopped, signal.SIGSTOP)
        assert await score(verifier, "7", "0" * 1_000_000, "1") == (-1, 1)
        assert verifier.failures == {"timeouts": 1, "deaths": 0, "errors": 0}
        await gone(stopped)

    run(function(f"{rewards}:judge", timeout_s=2), story)


def test_an_answer_that_waited_for_a_busy_driver_is_no_timeout(rewards):
    async def story(verifier: TextVerifier) -> None:
        job = asyncio.create_task(score(verifier, "7", "1"))
        for _ in range(10):  # until the request is on its way
            await asyncio.sleep(0)
        time.sleep(2)  # the driver computes, and looks at nothing for longer than the deadline
        assert await job == (1,)

    run(function(f"{rewards}:judge", timeout_s=1), story)


def test_a_cancelled_response_does_not_leave_its_reply_to_the_next(rewards):
    async def story(verifier: TextVerifier) -> None:
        job = asyncio.create_task(score(verifier, "7", "1"))
        for _ in range(10):
            await asyncio.sleep(0)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert await score(verifier, "7", "2") == (2,)

    run(function(f"{rewards}:judge"), story)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{}:jugde", "has no 'jugde'; did you mean 'judge'?"),
        (
            "{}:of_one",
            r"expected a function of \(prompt, response, answer\), but too many positional arguments",
        ),
        ("{}:half_done", "expected a function of .*is not a callable object"),
        ("{}", "expected 'package.module:name' or 'path/to/file.py:name'"),
        ("no_such_package.rewards:judge", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("no_such_file.py:judge", "FileNotFoundError"),
    ],
)
def test_a_function_that_is_none_is_refused_before_the_run_starts(rewards, target, words):
    async def never(verifier: TextVerifier) -> None:
        raise AssertionError("entered")

    with pytest.raises(ConfigError, match=f"reward.function = '.*{words}"):
        run(function(target.format(rewards)), never)


def test_a_worker_that_cannot_start_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    monkeypatch.setattr(judges, "WORKER", broken)

    async def never(verifier: TextVerifier) -> None:
        raise AssertionError("entered")

    with pytest.raises(RunError, match=r"(?s)in 3 attempts.*No module named 'no_such_module'"):
        run(make_verifier(RewardConfig()), never)


def test_garbage_instead_of_a_reply_is_a_death(monkeypatch, tmp_path):
    babbler = tmp_path / "babbler.py"
    babbler.write_text(
        "print('{\"ready\": true}', flush=True)\nfor line in __import__('sys').stdin: print('x' * 200_000)\n"
    )
    monkeypatch.setattr(judges, "WORKER", babbler)

    async def story(verifier: TextVerifier) -> None:
        assert await score(verifier, "7", "1", "2") == (0, 0)
        assert verifier.failures["deaths"] == 2

    run(make_verifier(RewardConfig()), story)


def test_mathematics_that_never_ends_is_worth_nothing_and_the_next_is_judged():
    async def story(verifier: TextVerifier) -> None:
        # equal texts are judged once: one deadline, not two
        assert await score(verifier, "7", TOWER, "\\boxed{7}", TOWER) == (0, 1, 0)
        assert verifier.failures == {"timeouts": 1, "deaths": 0, "errors": 0}

    run(make_verifier(RewardConfig(timeout_s=1)), story)


GARBAGE = {
    "boxes": "\\boxed{" * 15_000,
    "digits": "7" * 100_000,
    "dollars": "$" * 100_000,
    "fractions": "\\boxed{" + "\\frac{1}{" * 2000 + "2" + "}" * 2000 + "}",
    "brackets": "$" + "(" * 3000 + "7" + ")" * 3000 + "$",
    "bytes": bytes(range(256)).decode("latin-1") * 400,
}


def test_garbage_of_100_kb_is_worth_nothing_within_its_deadlines():
    async def story(verifier: TextVerifier) -> None:
        began = time.monotonic()
        assert await score(verifier, "7", *GARBAGE.values()) == (0.0,) * len(GARBAGE)
        assert time.monotonic() - began < 10 * len(GARBAGE)

    run(make_verifier(RewardConfig(timeout_s=1)), story)


def test_a_tiny_answer_takes_less_than_5_ms_of_processor_time():
    async def story(verifier: TextVerifier) -> None:
        before = psutil.Process(workers(verifier)[0]).cpu_times()
        assert sum(await score(verifier, "7", *[f"\\boxed{{{i}}}" for i in range(100)])) == 1
        after = psutil.Process(workers(verifier)[0]).cpu_times()
        assert after.user + after.system - before.user - before.system < 0.5

    run(make_verifier(RewardConfig(timeout_s=20)), story)


def test_closing_leaves_no_process_even_while_responses_are_judged(rewards):
    async def main() -> None:
        verifier = function(f"{rewards}:judge", num_processes=2)
        async with verifier:
            assert await score(verifier, "7", "1", "2") == (1, 2)
            pids = workers(verifier)
            assert len(pids) == 2
            job = asyncio.create_task(score(verifier, "7", "hang in C", "3", "4", "5"))
            for _ in range(10):
                await asyncio.sleep(0)
        with pytest.raises(RunError, match="verifier = closed"):
            await asyncio.wait_for(job, 10)
        assert not any(alive(pid) for pid in pids) and not workers(verifier)

    asyncio.run(main())


def test_workers_end_with_their_parent_even_if_it_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, os, signal\n"
        "from tests.data.test_judges import TOWER, make_verifier, RewardConfig, score, workers\n"
        "async def main():\n"
        "    async with make_verifier(RewardConfig(timeout_s=60)) as verifier:\n"
        "        job = asyncio.create_task(score(verifier, '7', TOWER))\n"
        "        await asyncio.sleep(0.1)\n"
        "        os.write(1, b'%d' % workers(verifier)[0])\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    root = str(Path(__file__).parents[2])
    out = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": root}, capture_output=True, timeout=60
    )
    asyncio.run(gone(int(out.stdout)))


# A reward server.


class Server:
    """Answers each request with the next of `replies` (status, body), or never where that is None."""

    def __init__(self, *replies: tuple[int, str] | None) -> None:
        self.replies = list(replies)
        self.requests: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append(await request.json())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            reply = self.replies.pop(0) if self.replies else (200, '{"reward": 1}')
            if reply is None:
                await asyncio.Event().wait()
            assert reply is not None
            await asyncio.sleep(0)
            status, body = reply
            return web.Response(
                status=status, text=body, content_type="application/json", headers={"Location": "/judge"}
            )
        finally:
            self.at_once -= 1


def serve(server: Server, story: Callable[[TextVerifier], Awaitable[None]], **options: float | int) -> None:
    async def main() -> None:
        app = web.Application()
        app.router.add_post("/judge", server.handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        cfg = RewardConfig.model_validate(
            {"verifier": "http", "url": f"http://127.0.0.1:{port}/judge", "failure_reward": -1, **options}
        )
        async with asyncio.timeout(60), make_verifier(cfg) as verifier:
            await story(verifier)
        await runner.cleanup()

    asyncio.run(main())


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(judges, "RETRY_WAITS_S", (0.0, 0.0))


def test_a_server_is_posted_what_was_said_and_its_number_is_the_reward():
    server = Server((200, '{"reward": 0.25}'), (200, '{"reward": -2, "why": "bad"}'))

    async def story(verifier: TextVerifier) -> None:
        assert await score(verifier, "7", "é") == (0.25,)
        assert await score(verifier, "7", "8") == (-2.0,)

    serve(server, story)
    assert server.requests[0] == {"uid": "u", "prompt": "<question>", "response": "é", "answer": "7"}


def test_requests_at_a_time_are_bounded_by_the_number_of_workers():
    server = Server()

    async def story(verifier: TextVerifier) -> None:
        assert await score(verifier, "7", *map(str, range(40))) == (1.0,) * 40

    serve(server, story, num_processes=3)
    assert 2 <= server.most_at_once <= 3


def test_a_server_that_fails_is_asked_again_and_then_the_response_is_counted():
    server = Server((503, "busy"), (500, "oops"), (200, '{"reward": 1}'), *[(502, "gone")] * 3)

    async def story(verifier: TextVerifier) -> None:
        assert await score(verifier, "7", "a") == (1.0,)
        assert await score(verifier, "7", "b") == (-1.0,)
        assert verifier.failures == {"timeouts": 0, "errors": 0, "outages": 1}
        assert await score(verifier, "7", "c") == (1.0,)

    serve(server, story)
    assert [request["response"] for request in server.requests] == ["a"] * 3 + ["b"] * 3 + ["c"]


def test_a_server_that_is_not_there_stops_the_run_in_the_end():
    async def main() -> None:
        judge = HttpJudge("http://127.0.0.1:9/judge", num_requests=4, timeout_s=5)  # discard: nobody listens
        async with TextVerifier(judge, -1) as verifier:
            assert await score(verifier, "7", *map(str, range(15))) == (-1,) * 15
            with pytest.raises(
                RunError, match=r"verifier outages = 16 in a row: .*127\.0\.0\.1:9/judge failed 3 times"
            ):
                await score(verifier, "7", "x")

    asyncio.run(main())


def test_a_refusal_is_never_asked_again_and_stops_the_run():
    for status in (400, 404, 429, 302):
        server = Server((status, "no"))

        async def story(verifier: TextVerifier, status: int = status) -> None:
            with pytest.raises(
                RunError, match=f"expected status 200 for prompt 'u', got HTTP {status}: b'no'"
            ):
                await score(verifier, "7", "a")

        serve(server, story)
        assert len(server.requests) == 1


def test_a_server_that_is_late_or_answers_garbage_fails_one_response():
    garbage = ["no json", "[1]", "{}", '{"reward": null}', '{"reward": NaN}', '{"reward": "1"}']
    server = Server(None, *[(200, body) for body in garbage])

    async def story(verifier: TextVerifier) -> None:
        for text in range(1 + len(garbage)):
            assert await score(verifier, "7", str(text)) == (-1.0,)
        assert verifier.failures == {"timeouts": 1, "errors": len(garbage), "outages": 0}
        assert await score(verifier, "7", "good") == (1.0,)

    serve(server, story, timeout_s=0.5)
    assert len(server.requests) == 2 + len(garbage)
