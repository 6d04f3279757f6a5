"""Verifiers: rules that compute a reward from a prompt's answer and a response's text.

Foreign mathematics runs in processes that can be killed.  math-verify hands what a model wrote to a computer
algebra system, which a single response can keep busy for ever or crash; neither may stop a run.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import IO

from megatron_vespo.types import Prompt, Response, RunError

log = logging.getLogger(__name__)

WORKER = Path(__file__).with_name("math_worker.py")
START_TIMEOUT_S = 60.0
MAX_START_ATTEMPTS = 3
MAX_DEATHS_IN_A_ROW = 16
"""A worker that dies of this many responses, with none judged in between, dies of something else."""


class _Verdict(Enum):
    EQUAL = "equal"
    DIFFERENT = "different"
    TIMEOUT = "timeout"
    DEATH = "death"


class MathVerifier:
    """Reward 1 if the response's answer is mathematically equal to the prompt's, else 0.

    A response that takes longer than `timeout_s` gets reward 0, and so does one of which the worker dies;
    the worker is replaced.  Workers start with the first call and end with `close` (or with this process).
    """

    def __init__(self, *, timeout_s: float, num_processes: int) -> None:
        self.num_timeouts = 0
        """Responses whose verification was ended by the deadline, so far."""
        self.num_deaths = 0
        """Responses of which a worker died (memory, a crash of the algebra system), so far."""
        self._timeout_s = timeout_s
        self._workers = [_Worker() for _ in range(num_processes)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # Threads of our own: a slow answer must not hold up what others give to asyncio's default pool.
        # They also live as long as the workers, which the kernel ends with the *thread* that started them.
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="verifier")
        self._deaths_in_a_row = 0
        self._closed = False

    async def score(self, prompt: Prompt, responses: Sequence[Response]) -> tuple[float, ...]:
        """One reward per response; equal texts are verified once.

        Raises:
            RunError: the workers cannot start or die of everything, or this verifier was closed.
        """
        if self._closed:
            raise RunError("verifier = closed: expected an open one to score with; make a new one")
        texts = list(dict.fromkeys(response.text for response in responses))
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(self._threads, self._judge, prompt.answer, text) for text in texts]
        verdicts = dict(zip(texts, await asyncio.gather(*jobs), strict=True))
        for verdict in verdicts.values():
            self._count(verdict, prompt)
        return tuple(float(verdicts[response.text] is _Verdict.EQUAL) for response in responses)

    def close(self) -> None:
        """End every worker; returns when they are gone."""
        self._closed = True
        for worker in self._workers:
            worker.kill()  # unblocks the thread that waits for it
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.kill()  # a thread may have started it in between

    def _judge(self, answer: str, text: str) -> _Verdict:
        worker = self._idle.get()
        try:
            verdict = _Verdict.DEATH if self._closed else worker.judge(answer, text, self._timeout_s)
        finally:
            self._idle.put(worker)
        if self._closed:  # the verdict is of our own killing
            raise RunError(
                "verifier = closed: closed while a response was being verified; close it after the last one"
            )
        return verdict

    def _count(self, verdict: _Verdict, prompt: Prompt) -> None:
        if verdict is _Verdict.DEATH:
            self.num_deaths += 1
            self._deaths_in_a_row += 1
        else:
            self._deaths_in_a_row = 0
        if verdict is _Verdict.TIMEOUT:
            self.num_timeouts += 1
            log.info(
                "prompt '%s': a response took longer than %g s to verify, reward 0",
                prompt.uid,
                self._timeout_s,
            )
        if self._deaths_in_a_row >= MAX_DEATHS_IN_A_ROW:
            raise RunError(
                f"verifier worker deaths = {self._deaths_in_a_row} in a row: expected some response to be judged; "
                f"try `{sys.executable} {WORKER} {os.getpid()}` by hand, and look for the out-of-memory killer"
            )


class _Worker:
    """One math_worker.py, started when it is needed; used by one thread at a time, killed by any."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def judge(self, answer: str, text: str, timeout_s: float) -> _Verdict:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([answer, text]).encode() + b"\n")
            process.stdin.flush()
            reply = _read_line(process, timeout_s)
        except TimeoutError:
            self.kill()
            return _Verdict.TIMEOUT
        except BrokenPipeError:
            reply = b""
        if not reply:
            self.kill()
            return _Verdict.DEATH
        return _Verdict.EQUAL if reply == b"1\n" else _Verdict.DIFFERENT

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        problems = []
        for _ in range(MAX_START_ATTEMPTS):
            with tempfile.TemporaryFile() as complaints:
                self._process = process = self._spawn(complaints)
                try:
                    if _read_line(process, START_TIMEOUT_S) == b"ready\n":
                        return process
                    problem = "it ended"
                except TimeoutError:
                    problem = f"it said nothing for {START_TIMEOUT_S:g} s"
                self.kill()
                complaints.seek(0)
                problems.append(f"{problem}: {complaints.read().decode(errors='replace').strip()[-500:]}")
        raise RunError(
            f"verifier worker = not started in {MAX_START_ATTEMPTS} attempts: expected it to be ready, but "
            f"{problems[-1]}; check that {sys.executable} has math-verify"
        )

    def _spawn(self, complaints: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # -P: the worker's own folder must not shadow anybody's modules.
            [sys.executable, "-P", str(WORKER), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,  # Ctrl-C is for the program, which then closes us
        )


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    """The worker's next line, or b"" if it is dead."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], timeout_s)
    if not readable:
        raise TimeoutError
    return process.stdout.readline()  # lines are written whole
