"""Where single responses are judged: here, in processes that can be killed, or by a server.

Foreign code runs in processes.  math-verify hands what a model wrote to a computer algebra system, and a user's
function does as it likes: a single response can keep either busy for ever or crash it, and neither may stop a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp

from megatron_vespo.config import ConfigError
from megatron_vespo.types import Prompt, RunError

T = TypeVar("T")

WORKER = Path(__file__).with_name("judge_worker.py")
START_TIMEOUT_S = 120.0
MAX_START_ATTEMPTS = 3
END_TIMEOUT_S = 10.0
SECOND_LOOK_S = 0.1
RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Before each further attempt to reach a server: it may be restarted meanwhile."""


@dataclass(frozen=True)
class Failure:
    """Why a response could not be judged."""

    kind: str
    detail: str


class Judge(Protocol):
    """One rule, applied to one response at a time; several responses may be given to it at once."""

    @property
    def failure_kinds(self) -> Sequence[str]:
        """What can go wrong."""
        ...

    async def open(self) -> None:
        """Show that it can judge, before a run depends on it."""
        ...

    async def judge(self, prompt: Prompt, text: str) -> float | Failure:
        """The reward of a response to this prompt."""
        ...

    async def close(self) -> None:
        """Leave no process and no connection; what is being judged fails."""
        ...


class InlineJudge:
    """A rule that cannot hang: (response text, answer) -> reward."""

    failure_kinds = ()

    def __init__(self, rule: Callable[[str, str], float]) -> None:
        self._rule = rule

    async def open(self) -> None:
        pass

    async def judge(self, prompt: Prompt, text: str) -> float:
        return self._rule(text, prompt.answer)

    async def close(self) -> None:
        pass


class WorkerPool:
    """Processes of judge_worker.py, started when they are needed; each judges one response at a time.

    A worker that is late is killed, with all that it started, and replaced: a `timeouts` failure.  If one dies, perhaps
    of another's deed (the out-of-memory killer), its response is tried once more; then it is a `deaths` failure.

    Args:
        arguments: of judge_worker.py, after the parent's process id.
        timeout_s: for one response, once a worker is there for it.
    """

    failure_kinds = ("timeouts", "deaths", "errors")

    def __init__(self, arguments: Sequence[str], *, num_processes: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._workers = [_Worker(arguments) for _ in range(num_processes)]
        # Last in, first out: no more processes than responses that came at once.
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def open(self) -> None:
        """Start one worker.

        Raises:
            ConfigError: the worker refuses its arguments.
            RunError: it does not start.
        """
        worker = await self._idle.get()
        try:
            await worker.start()
        finally:
            self._idle.put_nowait(worker)

    async def judge(self, prompt: Prompt, text: str) -> float | Failure:
        request = json.dumps([prompt.text, text, prompt.answer]).encode() + b"\n"
        worker = await self._idle.get()
        try:
            verdict = await worker.judge(request, self._timeout_s)
            if isinstance(verdict, Failure) and verdict.kind == "deaths":
                verdict = await worker.judge(request, self._timeout_s)
            return verdict
        finally:
            self._idle.put_nowait(worker)

    async def close(self) -> None:
        await asyncio.gather(*(worker.end() for worker in self._workers))


class _Worker:
    """One judge_worker.py, used by one task at a time, ended by any."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self._process: Process | None = None
        self._ended = False

    async def judge(self, request: bytes, timeout_s: float) -> float | Failure:
        process = self._process or await self.start()
        try:
            verdict = _verdict(await _bounded(_exchange(process, request), timeout_s), timeout_s)
        except BaseException:  # cancelled in the middle: its reply must not be taken for the next one's
            await self._kill()
            raise
        if isinstance(verdict, Failure) and verdict.kind != "errors":
            await self._kill()
        return verdict

    async def start(self) -> Process:
        problem = ""
        for _ in range(MAX_START_ATTEMPTS):
            with tempfile.TemporaryFile() as complaints:
                self._process = process = await self._spawn(complaints)
                assert process.stdout is not None
                try:
                    line = await _bounded(process.stdout.readline(), START_TIMEOUT_S)
                except BaseException:
                    await self._kill()
                    raise
                reply = _json(line or b"")
                if reply == {"ready": True}:
                    return process
                await self._kill()
                if isinstance(reply, dict) and "refused" in reply:
                    raise ConfigError(reply["refused"])
                said = f"it said nothing for {START_TIMEOUT_S:g} s" if line is None else f"it said {line!r}"
                complaints.seek(0)
                problem = f"{said}: {complaints.read().decode(errors='replace').strip()[-500:]}"
        raise RunError(
            f"verifier worker = not started in {MAX_START_ATTEMPTS} attempts: expected it to be ready, but {problem}; "
            f"try `{' '.join(self._command())}` by hand"
        )

    async def end(self) -> None:
        """Returns when it is gone; it does not start again."""
        self._ended = True
        await self._kill()

    async def _spawn(self, complaints: IO[bytes]) -> Process:
        if self._ended:
            raise RunError("verifier = closed: expected an open one to judge with; make a new one")
        process = await asyncio.create_subprocess_exec(
            *self._command(),
            stdin=PIPE,
            stdout=PIPE,
            stderr=complaints,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # it finds what we would find
            start_new_session=True,  # Ctrl-C is for the program, which then closes us
        )
        if self._ended:  # meanwhile
            process.kill()
        return process

    def _command(self) -> list[str]:
        # -P: the worker's own folder must not shadow anybody's modules.
        return [sys.executable, "-P", str(WORKER), str(os.getpid()), *self._arguments]

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it leads a session: what it started goes with it
            await _bounded(process.wait(), END_TIMEOUT_S)  # longer only where the kernel itself hangs


async def _exchange(process: Process, request: bytes) -> bytes:
    """One line for one line; b"" if the process is dead, or talks without end."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(request)
        await process.stdin.drain()
        return await process.stdout.readline()
    except (BrokenPipeError, ConnectionResetError, ValueError):
        return b""


async def _bounded(waiting: Coroutine[Any, Any, T], timeout_s: float) -> T | None:
    """What it returns, or None after the deadline."""
    task = asyncio.ensure_future(waiting)
    try:
        # Looked at twice: where the driver was busy until after the deadline, the answer may be there, unread.
        for patience_s in (timeout_s, SECOND_LOOK_S):
            done, _ = await asyncio.wait([task], timeout=patience_s)
            if done:
                return task.result()
        return None
    finally:
        task.cancel()


def _verdict(line: bytes | None, timeout_s: float) -> float | Failure:
    if line is None:
        return Failure("timeouts", f"not judged within {timeout_s:g} s")
    reply = _json(line)
    if isinstance(reply, float | int):
        return float(reply)
    if isinstance(reply, dict) and "error" in reply:
        return Failure("errors", reply["error"])
    return Failure("deaths", f"the worker said {line[:40]!r} and is replaced" if line else "the worker died")


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class HttpJudge:
    """A server that is posted {"uid", "prompt", "response", "answer"} and answers {"reward": number}.

    Connections that fail and statuses of 500 and above are tried again, after growing waits; then they are an `outages`
    failure.  A deadline that passes is a `timeouts` failure at once, and an answer without a number an `errors` failure.

    Args:
        num_requests: at a time.
        timeout_s: for one request.
    """

    failure_kinds = ("timeouts", "errors", "outages")

    def __init__(self, url: str, *, num_requests: int, timeout_s: float) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ConfigError(
                f"reward.url = '{url}': expected an address like http://host:port/path; write it so"
            )
        self._url = url
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(num_requests)
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))

    async def judge(self, prompt: Prompt, text: str) -> float | Failure:
        """The reward of a response to this prompt.

        Raises:
            RunError: the server refuses the request (a status from 300 to 499).
        """
        request = {"uid": prompt.uid, "prompt": prompt.text, "response": text, "answer": prompt.answer}
        problem = ""
        async with self._slots:
            for wait_s in (0.0, *RETRY_WAITS_S):
                await asyncio.sleep(wait_s)
                try:
                    return await self._post(request)
                except TimeoutError:  # before the others: aiohttp's timeouts of connecting are both
                    return Failure("timeouts", f"{self._url} did not answer within {self._timeout_s:g} s")
                except (aiohttp.ClientError, _Unavailable) as err:
                    problem = f"{type(err).__name__}: {err}"
        return Failure("outages", f"{self._url} failed {1 + len(RETRY_WAITS_S)} times, last {problem}")

    async def _post(self, request: Mapping[str, str]) -> float | Failure:
        if self._session is None or self._session.closed:
            raise RunError(
                "verifier = closed: expected an open one to judge with; enter it, or make a new one"
            )
        async with self._session.post(self._url, json=request, allow_redirects=False) as answer:
            body = await answer.read()
        if answer.status >= 500:
            raise _Unavailable(f"HTTP {answer.status}: {body[:200]!r}")
        if answer.status >= 300:
            raise RunError(
                f"reward.url = '{self._url}': expected status 200 for prompt '{request['uid']}', got HTTP {answer.status}: "
                f"{body[:500]!r}; mend the server or the address"
            )
        reply = _json(body)
        reward = reply.get("reward") if isinstance(reply, dict) else None
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            return Failure("errors", f'{self._url} answered {body[:200]!r}, expected {{"reward": number}}')
        return float(reward)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class _Unavailable(Exception):
    """The server is there and cannot answer now."""
