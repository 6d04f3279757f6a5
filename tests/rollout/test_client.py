"""One server over HTTP: what is refused, what failed, and what an engine says of itself."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from megatron_vespo.rollout.client import EngineClient, Load, open_pool
from megatron_vespo.rollout.failures import Aborted, Attempts, Failed, Lost, Refused, Silent, Unusable
from megatron_vespo.types import RunError


def ask(handler, work):
    """`work(client)` against an HTTP server that answers everything with `handler`."""

    async def main():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with open_pool() as pool:
            port = site._server.sockets[0].getsockname()[1]
            try:
                return await work(EngineClient(f"http://127.0.0.1:{port}", pool))
            finally:
                await runner.cleanup()

    return asyncio.run(main())


def says(status, body):
    async def handler(request):
        return web.json_response(body, status=status)

    return handler


async def reset(request):
    request.transport.abort()
    return web.Response()


def test_an_answer_is_the_body():
    assert ask(says(200, [1]), lambda c: c.generate({})) == b"[1]"


@pytest.mark.parametrize(
    ("handler", "kind", "why"),
    [
        (says(400, "too long"), Refused, "HTTP 400: .*too long"),
        (says(404, "?"), Refused, "HTTP 404"),
        (says(500, "broken"), Failed, "HTTP 500: .*broken"),
        (says(503, "busy"), Failed, "HTTP 503"),
        (reset, Failed, "ServerDisconnectedError"),
    ],
)
def test_refusals_and_failures_are_told_apart(handler, kind, why):
    with pytest.raises(kind, match=why):
        ask(handler, lambda c: c.generate({}))


def test_an_engine_that_is_not_there_failed():
    async def work():
        async with open_pool() as pool:
            client = EngineClient("http://127.0.0.1:9", pool)
            assert await client.load() is None
            assert not await client.is_healthy()
            await client.abort(["r"])
            await client.generate({})

    with pytest.raises(Failed, match="ClientConnectorError"):
        asyncio.run(work())


def test_the_load_is_summed_over_data_parallel_ranks():
    rank = {
        "num_running_reqs": 3,
        "num_waiting_reqs": 1,
        "num_used_tokens": 50,
        "total_prefill_uncached_tokens": 7,
        "gen_throughput": 2.5,
        "decode_moments": [4.0],
    }
    second = {**rank, "num_running_reqs": 2, "decode_moments": None}
    load = ask(says(200, {"loads": [rank, second]}), lambda c: c.load())
    assert load == Load(running=5, queued=2, tokens_s=5.0, counted=(100, 14, 4.0))


@pytest.mark.parametrize("body", [{}, {"loads": []}, {"loads": [{}]}, [1]])
def test_a_load_that_cannot_be_read_is_none(body):
    assert ask(says(200, body), lambda c: c.load()) is None


def test_every_kind_of_failure_is_tried_again_as_often_as_its_class_says():
    for kind in (Refused, Failed, Silent, Unusable, Lost, Aborted):
        attempts = Attempts("prompt 'p'")
        for _ in range(kind.retries):
            attempts.note("engine 1", kind("why"))
        with pytest.raises(RunError, match=f"prompt 'p' = {kind.kind}: asked for {kind.retries + 1} time"):
            attempts.note("engine 1", kind("why"))


def test_pauses_double_up_to_a_limit_and_the_engine_is_avoided():
    attempts = Attempts("prompt 'p'")
    assert [attempts.note("engine 1", Failed("why")) for _ in range(5)] == [0.2, 0.4, 0.8, 1.6, 3.2]
    assert attempts.avoid == {"engine 1"}
    attempts.note("engine 2", Aborted("why"))
    assert attempts.avoid == {"engine 1"}  # an interruption is nobody's fault


def test_the_end_names_each_reason_once():
    attempts = Attempts("prompt 'p'")
    attempts.note("engine 1", Failed("HTTP 503"))
    attempts.note("engine 1", Failed("HTTP 503"))
    attempts.note("engine 2", Silent("no answer"))
    with pytest.raises(RunError) as caught:
        attempts.note("engine 3", Refused("HTTP 400"))
    assert str(caught.value).splitlines()[1:] == [
        "  engine 1: HTTP 503", "  engine 2: no answer", "  engine 3: HTTP 400",
    ]  # fmt: skip
