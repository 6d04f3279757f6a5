"""Starts simulated engines as processes, in the shape in which real servers are started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

from megatron_vespo.rollout.server import HOST, ending, free_port, is_free, spawn_tethered
from megatron_vespo.rollout.simulated_engine.behaviour import Behaviour
from megatron_vespo.types import RunError

START_WITHIN_S = 60.0
TAIL_BYTES = 4096


class SimulatedServer:
    """One simulated engine in a process of its own, which never outlives this one."""

    def __init__(self, name: str, model: Path, log: Path, behaviour: Behaviour | None = None) -> None:
        """Prepare, start nothing.

        Args:
            log: file to which the process's output is appended.
        """
        self.name = name
        self.model = model
        self.log = log
        self.url = ""
        self.behaviour = behaviour or Behaviour()
        """May be replaced between lives."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process group: `os.killpg(pid, signal.SIGSTOP)` freezes the engine; None before the start."""
        return self._process.pid if self._process else None

    async def start(self) -> str:
        """Start the process and wait until it answers; again after it died.

        Returns:
            http://host:port

        Raises:
            RunError: it died, or did not answer within a minute and `start_delay_s`.
        """
        await self.stop()
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        self._process = _spawn(self.model, port, 1, self.behaviour, self.log)
        try:
            await _wait_until_up(self.url, START_WITHIN_S + self.behaviour.start_delay_s, self.death_report)
        except BaseException:
            await self.stop()
            raise
        return self.url

    async def stop(self) -> None:
        """End the process, also a stopped one.  Safe to call twice."""
        if self._process is not None:
            _kill(self._process)
            self._process = None

    async def death_report(self) -> str | None:
        """None while the process lives; else its exit status and the end of its log."""
        return _report(self._process, self.log)

    def suffer(self, fault: str, **parameters: Any) -> dict[str, Any]:
        """Put a fault on it (faults.py), or with "heal" take all off; returns its state."""
        return _simulate(self.url, {"fault": fault, **parameters})

    def state(self) -> dict[str, Any]:
        """What GET /simulate tells."""
        return _simulate(self.url, {})

    async def __aenter__(self) -> SimulatedServer:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


class SimulatedServers:
    """Many simulated engines in one process, which die and live again each on its own; a context manager."""

    def __init__(self, num: int, model: Path, log: Path, behaviour: Behaviour | None = None) -> None:
        """Prepare, start nothing; arguments as of `SimulatedServer`."""
        self.engines = tuple(HostedEngine(f"engine {number}") for number in range(num))
        self._model = model
        self._log = log
        self._behaviour = behaviour or Behaviour()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process group; None before the start."""
        return self._process.pid if self._process else None

    async def __aenter__(self) -> SimulatedServers:
        port = _free_ports(len(self.engines))
        self._process = _spawn(self._model, port, len(self.engines), self._behaviour, self._log)
        for number, engine in enumerate(self.engines):
            engine.url = f"http://{HOST}:{port + number}"
        try:
            await _wait_until_up(
                self.engines[-1].url, START_WITHIN_S + self._behaviour.start_delay_s, self._death_report
            )
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._process is not None:
            _kill(self._process)
            self._process = None

    async def _death_report(self) -> str | None:
        return _report(self._process, self._log)


class HostedEngine:
    """One engine of a process of several: its death closes its connections, its start revives it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = ""
        self._lives = False

    async def start(self) -> str:
        """Begin a life, with the first weight version; returns http://host:port."""
        if self._lives:
            await asyncio.to_thread(self.suffer, "revive")
        self._lives = True
        return self.url

    async def stop(self) -> None:
        """End its life."""
        await asyncio.to_thread(self.suffer, "die")

    async def death_report(self) -> str | None:
        """None while it lives."""
        dead = (await asyncio.to_thread(self.state))["dead"]
        return "was ended by a simulated fault" if dead else None

    def suffer(self, fault: str, **parameters: Any) -> dict[str, Any]:
        """Put a fault on it (faults.py), or with "heal" take all off; returns its state."""
        return _simulate(self.url, {"fault": fault, **parameters})

    def state(self) -> dict[str, Any]:
        """What GET /simulate tells."""
        return _simulate(self.url, {})


def _spawn(
    model: Path, port: int, num_engines: int, behaviour: Behaviour, log: Path
) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", __package__, "--model", str(model), "--host", HOST, "--port", str(port)]
    argv += ["--engines", str(num_engines), *behaviour.argv()]
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with log.open("ab") as output:
        return spawn_tethered(argv, environment, output)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The whole group, which also ends what SIGSTOP froze."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _report(process: subprocess.Popen[bytes] | None, log: Path) -> str | None:
    if process is None:
        return "was never started"
    status = process.poll()
    if status is None:
        return None
    return f"{ending(status)}; the end of {log}:\n{log.read_bytes()[-TAIL_BYTES:].decode(errors='replace')}"


async def _wait_until_up(
    url: str, timeout_s: float, death_report: Callable[[], Awaitable[str | None]]
) -> None:
    deadline = asyncio.get_running_loop().time() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/ready") as answer:
                    if answer.status == 200:
                        return
            if report := await death_report():
                raise RunError(f"simulated engine at {url}: died while it started, {report}")
            if asyncio.get_running_loop().time() > deadline:
                raise RunError(f"simulated engine at {url}: not ready after {timeout_s:.0f} s; see its log")
            await asyncio.sleep(0.02)


def _free_ports(num: int) -> int:
    """The first of `num` consecutive ports on which nobody listens."""
    for _ in range(100):
        first = free_port()
        if all(is_free(HOST, port) for port in range(first, first + num)):
            return first
    raise RunError(f"free ports = none: no {num} in a row; end what listens on {HOST}")


def _simulate(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is no such fault.
    """
    request = urllib.request.Request(f"{url}/simulate", data=json.dumps(body).encode(), method="POST")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as err:
        raise ValueError(json.loads(err.read())["error"]["message"]) from err
