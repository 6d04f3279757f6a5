"""One SGLang server over HTTP; nothing is retried here (failures.py says what is, and fleet.py does it)."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from megatron_vespo.rollout.failures import Failed, Refused

KEPT_ALIVE_S = 3.0
"""uvicorn closes idle connections after 5 s: one that is reused must be younger, or a request meets a closing one."""
PROBE_TIMEOUT_S = 30.0
ERROR_CHARACTERS = 500


@dataclass(frozen=True)
class Load:
    """What an engine says of itself, summed over its data-parallel ranks."""

    running: int
    queued: int
    tokens_s: float
    counted: tuple[float, ...]
    """Counters of computed tokens and steps: unchanged means that nothing was computed."""


def open_pool() -> aiohttp.ClientSession:
    """One pool of connections for all engines; make it in the loop that uses it, and close it there.

    Every request under way holds a connection, which is an open file: this process is allowed as many as it may have.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_ALIVE_S)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


class EngineClient:
    """One engine, asked over a pool that it shares with all others."""

    def __init__(self, url: str, pool: aiohttp.ClientSession) -> None:
        self._url = url
        self._pool = pool

    async def generate(self, payload: Mapping[str, Any]) -> bytes:
        """POST /generate; the deadline is the caller's.

        Raises:
            Refused: HTTP 4xx.
            Failed: HTTP 5xx, or no connection.
        """
        try:
            async with self._pool.post(
                f"{self._url}/generate",
                data=orjson.dumps(payload),
                headers={"Content-Type": "application/json"},
            ) as answer:
                body = await answer.read()
                if answer.status == 200:
                    return body
        except (aiohttp.ClientError, OSError) as err:
            raise Failed(f"{self._url}/generate = {type(err).__name__}: {err}") from err
        why = (
            f"{self._url}/generate = HTTP {answer.status}: {body[:ERROR_CHARACTERS].decode(errors='replace')}"
        )
        raise Refused(why) if 400 <= answer.status < 500 else Failed(why)

    async def abort(self, rids: Sequence[str]) -> None:
        """Have the engine forget these sequences; one that is gone has done so already."""
        await asyncio.gather(*(self._quietly("POST", "/abort_request", {"rid": rid}) for rid in rids))

    async def is_healthy(self) -> bool:
        """/health, for which an idle SGLang generates a token."""
        return await self._quietly("GET", "/health", None) is not None

    async def load(self) -> Load | None:
        """What it is doing; None where it does not answer.

        SGLang's scheduler leaves these numbers in shared memory after every batch, so that asking costs it nothing,
        and the HTTP process goes on to answer with old ones when the scheduler hangs.
        """
        body = await self._quietly("GET", "/v1/loads?include=core", None)
        try:
            ranks = orjson.loads(body)["loads"] if body else None
            return _load(ranks) if ranks else None
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return None  # as good as no answer: its absence is counted

    async def _quietly(self, method: str, path: str, payload: Mapping[str, Any] | None) -> bytes | None:
        """The body of a 200; None for whatever else happens, which the caller takes as a missing sign of life."""
        try:
            async with (
                asyncio.timeout(PROBE_TIMEOUT_S),
                self._pool.request(method, self._url + path, json=payload) as answer,
            ):
                body = await answer.read()
                return body if answer.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None


def _load(ranks: Sequence[Mapping[str, Any]]) -> Load:
    def total(key: str) -> float:
        return sum(rank[key] for rank in ranks)

    steps = tuple(moment for rank in ranks for moment in rank.get("decode_moments") or ())
    return Load(
        running=int(total("num_running_reqs")),
        queued=int(total("num_waiting_reqs")),
        tokens_s=total("gen_throughput"),
        counted=(total("num_used_tokens"), total("total_prefill_uncached_tokens"), *steps),
    )
