"""The processes behind engines: one SGLang server started, watched and ended here, or one that somebody else runs.

The server is stock.  With device = "cpu" the folder `sglang_cpu/` on its PYTHONPATH adds a plain-PyTorch platform.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import aiohttp

from megatron_vespo.config import ConfigError, RolloutConfig
from megatron_vespo.rollout.model import read_facts
from megatron_vespo.types import RunError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
CPU_PLATFORM = Path(__file__).with_name("sglang_cpu")
TETHER = Path(__file__).with_name("tether.py")
CPU_POOL_TOKENS = 65536
CONTEXT_SLACK = 8
"""SGLang refuses inputs within 6 tokens of its context length, and cuts responses short there without a word."""
REPORT_EVERY_S = 30.0
TAIL_LINES = 20
TERMINATE_WITHIN_S = 10.0
USAGE_ERROR = "exited with status 2"
"""So ends a program that refuses its command line: here, an option in rollout.sglang."""


OWNED = {
    "model-path": "set model",
    "host": "it is an address of the engine's machine",
    "base-gpu-id": "an engine sees only the GPUs that it was given",
    "port": "set rollout.port",
    "device": "set rollout.device",
    "dtype": "set rollout.dtype",
    "tensor-parallel-size": "set rollout.tensor_parallel",
    "tp-size": "set rollout.tensor_parallel",
    "context-length": "set rollout.context_length",
    "max-running-requests": "set rollout.max_running_requests",
    "weight-version": "it counts optimizer steps",
    "random-seed": "set seed",
}
"""Options that rollout.sglang may not override, and what to do instead."""


class EngineProcess(Protocol):
    """What runs one engine, wherever that is."""

    name: str
    """In every message: "engine 3"."""

    async def start(self) -> str:
        """Start it, and return its url once it answers.

        Raises:
            ConfigError: a person has to mend something first.
            RunError: it died, or did not answer in time; nothing is left running.
        """
        ...

    async def stop(self) -> None:
        """End it.  Safe to call twice.

        Raises:
            RunError: it cannot be ended.
        """
        ...

    async def death_report(self) -> str | None:
        """None while it lives; else how it died, as what follows "its process"."""
        ...


class Command(NamedTuple):
    """How the server is started."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Added to our own environment."""


def command(
    cfg: RolloutConfig,
    model: Path,
    port: int,
    *,
    host: str = HOST,
    gpus: Sequence[int] | None = None,
    version: int = 0,
    seed: int = 0,
) -> Command:
    """The server's command line and the environment it adds; starts nothing.

    Args:
        host: address to listen on.
        gpus: the devices that it may use, by CUDA's numbers; None: those of our environment.
        version: weight version that the weights in `model` are.

    Raises:
        ConfigError: the interpreter, the model or its tokenizer is missing, the context exceeds the model's, or
            rollout.sglang names an option that is ours.
    """
    facts = read_facts(model)
    if cfg.context_length > facts.max_positions:
        raise ConfigError(
            f"rollout.context_length = {cfg.context_length}: must be at most max_position_embeddings = "
            f"{facts.max_positions} of '{model}'; lower it"
        )
    options: dict[str, Any] = {
        "model-path": str(model.resolve()),
        "host": host,
        "port": port,
        "device": cfg.device,
        "dtype": cfg.dtype,
        "tensor-parallel-size": cfg.tensor_parallel,
        "context-length": cfg.context_length + CONTEXT_SLACK,
        "max-running-requests": cfg.max_running_requests,
        "enable-fp32-lm-head": cfg.dtype == "bfloat16",  # as the trainer: logits of either are float32
        "enable-return-routed-experts": cfg.record_experts and facts.is_moe,
        "weight-version": version,
        "random-seed": seed,
        # With overlap the batch under way when a push freezes requests would be labelled with weights that it never met.
        "disable-overlap-schedule": cfg.partial_rollouts == "in_place",
        "log-level-http": "warning",
    }
    env = {"HF_HUB_OFFLINE": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}  # for CONTEXT_SLACK alone
    if cfg.device == "cpu":
        options |= _cpu_options(cfg)
        env |= _cpu_env(cfg)
    if gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    options |= _verbatim_options(cfg)
    argv = [_interpreter(cfg), "-m", "sglang.launch_server"]
    return Command((*argv, *(word for option in options.items() for word in _words(*option))), env)


def free_port(host: str = HOST) -> int:
    """A port of an address of this machine on which nobody listens, outside the range that the kernel hands out."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    low = 20000 if first_ephemeral > 21000 else 10000
    for port in random.sample(range(low, max(first_ephemeral, low + 1000)), 100):
        if is_free(host, port):
            return port
    raise RunError(
        f"free port = none: 100 ports of {host} from {low} on are all in use; end what listens there"
    )


def spawn_tethered(
    argv: Sequence[str], environment: Mapping[str, str], log: BinaryIO
) -> subprocess.Popen[bytes]:
    """A process group of its own that never outlives this process; what it prints goes to `log`."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), *argv],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def ending(status: int) -> str:
    """How a process ended, from its exit status as subprocess gives it."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


@dataclass(eq=False)
class Server:
    """A running SGLang server; `async with Server(...)` starts it and ends it with all its children.

    It never outlives this process, not even when that is killed: `tether.py` then ends the whole process group.
    Start it from a thread that lives as long as the server is wanted.
    """

    cfg: RolloutConfig
    model: Path
    log: Path
    """File to which the server's output is appended."""
    name: str = field(default="engine 0", kw_only=True)
    """Names it in messages."""
    host: str = field(default=HOST, kw_only=True)
    """Address of this machine on which it listens."""
    gpus: Sequence[int] | None = field(default=None, kw_only=True)
    """The devices that it may use, by CUDA's numbers; None: those of our environment."""
    version: int = field(default=0, kw_only=True)
    """Weight version that the weights in `model` are."""
    seed: int = field(default=0, kw_only=True)
    progress: Callable[[str], None] = field(default=logger.info, kw_only=True)
    """Told every 30 s what is being waited for."""
    _port: int = field(default=0, init=False)
    _log_start: int = field(default=0, init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self._port}"

    @property
    def pid(self) -> int | None:
        """Process id, which is also the id of the process group; None before the start."""
        return self._process.pid if self._process else None

    async def start(self) -> str:
        """Start the process, wait until it answers, and return its url.

        Raises:
            ConfigError: what it needs is missing, or the port is taken.
            RunError: it died (with the end of its log) or missed `start_timeout_s`; nothing is left running.
        """
        self._port = self.cfg.port or free_port(self.host)
        if not is_free(self.host, self._port):
            raise ConfigError(
                f"rollout.port = {self._port}: in use on {self.host}; leave it out to get a free one"
            )
        argv, env = await asyncio.to_thread(self._command)
        environment = _environment(env)
        sglang = await asyncio.to_thread(sglang_version, argv[0], environment)
        if sglang < (0, 5, 23) and "--disable-radix-cache" not in argv:
            # There a flush is refused while retracted requests wait, so that a pushed weight would meet old keys.
            argv = (*argv, "--disable-radix-cache")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._spawn(argv, environment)
            await self._wait_until_healthy()
        except BaseException:
            await self.stop()
            raise
        return self.url

    async def stop(self) -> None:
        """End the server's whole process group: SIGTERM, 10 s, SIGKILL.  Safe to call twice.

        Raises:
            RunError: a process survived SIGKILL.
        """
        if self._process is None:
            return
        for sig in (signal.SIGTERM, signal.SIGKILL):
            for pid in await asyncio.to_thread(_living_members, self._process.pid):
                _signal(pid, sig)
            deadline = time.monotonic() + TERMINATE_WITHIN_S
            while await asyncio.to_thread(_living_members, self._process.pid):
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.05)
            else:
                self._process.wait()
                return
        raise RunError(
            f"{self.name} at {self.url} = pids {_living_members(self._process.pid)}: survived SIGKILL for "
            f"{TERMINATE_WITHIN_S:.0f} s; look for a stuck device driver"
        )

    async def death_report(self) -> str | None:
        """None while the process lives; else its exit status and the end of its log."""
        if self._process is None:
            return "was never started"
        status = self._process.poll()
        if status is None:
            return None
        return f"{ending(status)}; the end of {self.log}:\n{self._log_tail()}"

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def _command(self) -> Command:
        return command(
            self.cfg,
            self.model,
            self._port,
            host=self.host,
            gpus=self.gpus,
            version=self.version,
            seed=self.seed,
        )

    def _spawn(self, argv: tuple[str, ...], environment: dict[str, str]) -> None:
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = spawn_tethered(argv, environment, log)

    async def _wait_until_healthy(self) -> None:
        began = reported = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while await _body(session, f"{self.url}/health") is None:
                if report := await self.death_report():
                    error = ConfigError if report.startswith(USAGE_ERROR) else RunError
                    raise error(f"{self.name} at {self.url}: died while it started, {report}")
                waited = time.monotonic() - began
                if waited > self.cfg.start_timeout_s:
                    raise RunError(
                        f"{self.name} at {self.url} = not ready: waited {waited:.0f} s for /health; raise "
                        f"rollout.start_timeout_s, or see the end of {self.log}:\n{self._log_tail()}"
                    )
                if time.monotonic() - reported >= REPORT_EVERY_S:
                    reported = time.monotonic()
                    last = (self._log_tail().splitlines() or ["(nothing yet)"])[-1]
                    self.progress(
                        f"waited {waited:.0f} s for {self.name} at {self.url}; its last line: {last}"
                    )
                await asyncio.sleep(0.25)
            body = await _body(session, f"{self.url}/server_info")
        # Between our check of the port and its start another server may have come to listen there, of this run perhaps.
        served = json.loads(body or b"{}")
        if (served.get("model_path"), served.get("random_seed")) != (str(self.model.resolve()), self.seed):
            raise RunError(
                f"{self.url} = a server of '{served.get('model_path')}' with random seed {served.get('random_seed')}: expected "
                f"'{self.model}' with {self.seed}; the port is taken, start again"
            )

    def _log_tail(self) -> str:
        with self.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - 8192))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-TAIL_LINES:])


class External:
    """A server that somebody else started and ends: waited for, and used."""

    def __init__(self, name: str, url: str, start_timeout_s: float) -> None:
        """`url`: http://host:port."""
        self.name = name
        self._url = url
        self._start_timeout_s = start_timeout_s

    async def start(self) -> str:
        """Wait until it answers, and return its url.

        Raises:
            RunError: it does not within `start_timeout_s`.
        """
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
            try:
                async with asyncio.timeout(self._start_timeout_s):
                    while await _body(session, f"{self._url}/health") is None:
                        await asyncio.sleep(0.5)
            except TimeoutError:
                raise RunError(
                    f"{self.name} at {self._url} = no answer: waited {self._start_timeout_s:.0f} s "
                    "(rollout.start_timeout_s) for /health; start it, or take it out of rollout.external"
                ) from None
        return self._url

    async def stop(self) -> None:
        """Nothing: it is not ours to end."""

    async def death_report(self) -> str | None:
        """None: whether it lives is only seen in its answers."""
        return None


def sglang_version(python: str, environment: Mapping[str, str]) -> tuple[int, ...]:
    """The version of SGLang that an interpreter would run; imports nothing of it.

    Raises:
        ConfigError: the interpreter does not run, or has no SGLang.
    """
    code = "from importlib.metadata import version; print(version('sglang'))"
    try:
        asked = subprocess.run(
            [python, "-c", code], env=dict(environment), capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise ConfigError(
            f"rollout.python = '{python}': cannot be run ({err}); give a Python interpreter"
        ) from err
    if asked.returncode:
        name = importlib.metadata.PackageNotFoundError.__name__
        why = "has no sglang" if name in asked.stderr else f"fails: {asked.stderr.strip()[-300:]}"
        raise ConfigError(
            f"rollout.python = '{python}': {why}; install sglang there, or name another interpreter"
        )
    return tuple(int(part) for part in asked.stdout.strip().split(".")[:3] if part.isdigit())


def _interpreter(cfg: RolloutConfig) -> str:
    python = str(cfg.python) if cfg.python else sys.executable
    found = shutil.which(python)
    if found is None:
        raise ConfigError(
            f"rollout.python = '{python}': no such program; give the interpreter of the venv with sglang"
        )
    return found


def _verbatim_options(cfg: RolloutConfig) -> dict[str, Any]:
    options = {key.replace("_", "-"): value for key, value in cfg.sglang.items()}
    for key in options:
        # SGLang's argument parser takes the beginning of an option for the option (`model`, `tp`).
        if owned := next((name for name in OWNED if name.startswith(key)), None):
            raise ConfigError(f"rollout.sglang.{key}: cannot be overridden, {OWNED[owned]}; take it out")
    return options


def _cpu_options(cfg: RolloutConfig) -> dict[str, Any]:
    """The pool is bounded by tokens: as a share of host memory it would depend on who else starts just now."""
    return {
        "attention-backend": "torch_native",
        "sampling-backend": "pytorch",
        "grammar-backend": "none",
        "sleep-on-idle": True,  # an idle scheduler otherwise spins on a core that the trainer needs
        "mem-fraction-static": 0.5,
        "max-total-tokens": max(
            cfg.context_length + 2 * CONTEXT_SLACK,
            min(cfg.max_running_requests * cfg.context_length, CPU_POOL_TOKENS),
        ),
    }


def _cpu_env(cfg: RolloutConfig) -> dict[str, str]:
    env = {
        "PYTHONPATH": str(CPU_PLATFORM),
        "SGLANG_PLATFORM": "plain_cpu",
        "SGLANG_USE_CPU_ENGINE": "0",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if cfg.tensor_parallel > 1:  # SGLang wants the cores of every rank named
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(cfg.tensor_parallel)))
    return env


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    """Our environment and what is added; PYTHONPATH is prepended, since the user's own may carry the engine."""
    paths = [p for p in (added.get("PYTHONPATH"), os.environ.get("PYTHONPATH")) if p]
    return {**os.environ, **added, **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def _words(name: str, value: Any) -> list[str]:
    """True is a bare flag, False and None leave the option out, a list is several values."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]


def is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


async def _body(session: aiohttp.ClientSession, url: str) -> bytes | None:
    """What a GET answers with 200; None where it does anything else."""
    try:
        async with session.get(url) as answer:
            body = await answer.read()
            return body if answer.status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None


def _living_members(group: int) -> list[int]:
    """Processes of a process group, without those that are dead and only not yet reaped."""
    living = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
        if int(pgrp) == group and state not in "ZX":
            living.append(int(stat.parent.name))
    return living


def _signal(pid: int, sig: signal.Signals) -> None:
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        return  # ended by itself
