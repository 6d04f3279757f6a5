"""SGLang servers under Ray: one actor per engine, wherever its GPUs are.

The server is a process group of its own on the actor's node, which ends with the actor, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from megatron_vespo.config import ConfigError, RolloutConfig
from megatron_vespo.control.cluster import LOOPBACK, Options, print_to
from megatron_vespo.rollout.server import Server
from megatron_vespo.types import RunError

logger = logging.getLogger(__name__)

_ANSWERS_WITHIN_S = 10.0
_PLACED_WITHIN_S = 120.0
"""Its place is reserved; an actor that does not come into being there has lost its node."""


@ray.remote
class EngineActor:
    """Runs one `Server` on its node."""

    def __init__(self, log_file: str) -> None:
        """What this process itself prints goes to `log_file`; the server has a log of its own."""
        print_to(log_file)
        self._server: Server | None = None

    async def start(self, name: str, cfg: RolloutConfig, model: Path, log: Path, **options: Any) -> str:
        """Start the server, and return its url once it answers."""
        host = LOOPBACK if options.pop("is_local") else ray.util.get_node_ip_address()
        self._server = Server(cfg, model, log, name=name, host=host, **options)
        return await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()

    async def death_report(self) -> str | None:
        return await self._server.death_report() if self._server else "was never started"


class RayEngine:
    """The `EngineProcess` of one engine: an actor that is made anew with every start."""

    def __init__(
        self, name: str, cfg: RolloutConfig, model: Path, logs: Path, place: Options, **options: Any
    ) -> None:
        """
        Args:
            place: resources and node of the actor.
            options: further arguments of `Server` (seed, gpus), and is_local: whether the server needs no other address
                than the loopback.
        """
        self.name = name
        self._cfg, self._model, self._place, self._options = cfg, model.resolve(), place, options
        self._logs = logs.resolve()
        self._actor: Any = None

    async def start(self) -> str:
        """A new actor and its server; the url once it answers.

        Raises:
            ConfigError, RunError: as `Server.start`; RunError also if the actor's process dies.
        """
        await self.stop()
        slug = self.name.replace(" ", "-")
        self._actor = EngineActor.options(max_concurrency=8, **self._place).remote(  # type: ignore[attr-defined]
            str(self._logs / f"{slug}-actor.log")
        )
        log = self._logs / f"{slug}.log"
        limit_s = self._cfg.start_timeout_s + _PLACED_WITHIN_S
        try:
            async with asyncio.timeout(limit_s):
                return await self._actor.start.remote(self.name, self._cfg, self._model, log, **self._options)
        except RayTaskError as error:
            if isinstance(error.cause, RunError | ConfigError):
                raise error.cause from None
            raise RunError(
                f"{self.name}: {error.cause!r} while it started; see {self._logs / slug}-actor.log"
            ) from error
        except TimeoutError:
            raise RunError(
                f"{self.name}: not started within {limit_s:.0f} s (rollout.start_timeout_s and the time for its actor); its "
                "node may be gone"
            ) from None
        except RayError as error:
            raise RunError(
                f"{self.name}: its actor died while it started ({error}); see Ray's logs"
            ) from error

    async def stop(self) -> None:
        """End the server and the actor; an actor that does not answer is killed, and its server dies with it."""
        actor, self._actor = self._actor, None
        if actor is None:
            return
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(3 * _ANSWERS_WITHIN_S):
                await actor.stop.remote()
        ray.kill(actor)

    async def death_report(self) -> str | None:
        """None while the server lives; else how it died, or that its actor did."""
        if self._actor is None:
            return "is not started"
        try:
            async with asyncio.timeout(_ANSWERS_WITHIN_S):
                return await self._actor.death_report.remote()
        except (RayError, TimeoutError) as error:
            return f"is out of reach: its actor {error or f'did not answer for {_ANSWERS_WITHIN_S:.0f} s'}"
