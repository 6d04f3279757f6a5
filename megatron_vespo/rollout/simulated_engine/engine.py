"""The HTTP surface of SGLang 0.5.23, answered by a simulated engine.

Shapes, states and refusals are those of the real server, its traps included: an abort names requests by the beginning
of their id, misses the samples of a request with n > 1 and whatever waits for a pause to end; what was retracted loses
its newest tokens when it is aborted; a token outside the vocabulary kills the engine; health checks fail in a pause.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from megatron_vespo.rollout.simulated_engine import reports
from megatron_vespo.rollout.simulated_engine.behaviour import Behaviour
from megatron_vespo.rollout.simulated_engine.content import Content, version_number
from megatron_vespo.rollout.simulated_engine.faults import Faults
from megatron_vespo.rollout.simulated_engine.generation import (
    Call,
    Generation,
    OutsideVocabulary,
    Unacceptable,
    times_of,
)
from megatron_vespo.rollout.simulated_engine.scheduler import Outcome, Request, Scheduler
from megatron_vespo.rollout.simulated_engine.weights import Refused, Weights

try:
    from orjson import dumps, loads
except ImportError:  # several times slower, and otherwise the same
    loads = json.loads

    def dumps(value: Any, /) -> bytes:
        return json.dumps(value).encode()


logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 5.0
HEALTH_CHECK_S = 20.0
PAUSE_POLL_S = 1.0
FLUSH_POLL_S = 0.002
MAX_BODY_BYTES = 1 << 32

Body = dict[str, Any]
Handler = Callable[[Body], Awaitable[web.Response]]


class SimulatedEngine:
    """One engine; make it and use it in one event loop."""

    def __init__(self, model: Path, behaviour: Behaviour, content: Content, *, alone: bool) -> None:
        """
        Args:
            content: of `model`; engines of one process may share it.
            alone: whether its death is the death of the process.
        """
        self._model = model
        self._behaviour = behaviour
        self._content = content
        self._alone = alone
        self._context_length = behaviour.context_length or content.facts.max_positions
        self._loop = asyncio.get_running_loop()
        self._routes = self._make_routes()
        self.server = web.Server(
            self._handle,
            request_factory=partial(_request, self._loop),
            handler_cancellation=True,
            keepalive_timeout=KEEP_ALIVE_S,
            access_log=None,
        )
        """What listens on the engine's port."""
        self._begin_life(behaviour.weight_version)
        for fault in behaviour.faults:
            self._suffer(json.loads(fault))

    def _begin_life(self, label: str) -> None:
        capacity = self._behaviour.max_total_tokens
        capacity = capacity or self._behaviour.max_running_requests * self._context_length
        self._label = label
        self._dead = False
        self._startup_s = time.perf_counter()  # any number that another life does not have
        self._scheduler = Scheduler(self._behaviour, capacity, label, version_number(label), self._loop)
        self._generation = Generation(self._content, self._context_length, self._loop)
        self._weights = Weights(self._model)
        self._faults = Faults(self._behaviour.seed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scheduler")
        self._control = asyncio.Lock()
        self._awake = _set_event()  # clear while it is frozen in a transfer
        self._unpaused = _set_event()
        self._not_updating = _set_event()
        self._idle = _set_event()
        self._num_inside = 0
        self._abort_sent: dict[str, bool] = {}  # of every request id that is known
        self._aborts_in_pause: list[Request] = []
        self._in_session = False
        self._bucket = 0

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/simulate":
            return self._simulate(await _body(request))
        if self._dead or self._faults.strike("drop", path=request.path):
            return _hang_up(request)
        if self._faults.strike("silent", path=request.path):
            await asyncio.Event().wait()
        for kind, status in (("refuse", 400), ("flaky", 500)):
            if fault := self._faults.strike(kind, path=request.path):
                return _json({"error": {"message": f"simulated fault: {kind}"}}, fault.get("status", status))
        return await self._route(request)

    async def _route(self, request: web.BaseRequest) -> web.Response:
        methods = self._routes.get(request.path)
        if methods is None:
            return _json({"detail": "Not Found"}, 404)
        handler = methods.get(request.method)
        if handler is None:
            return _json({"detail": "Method Not Allowed"}, 405)
        try:
            answer = await handler({**request.query, **await _body(request)})
        except Refused as err:
            return _json({"success": False, "message": str(err)}, 400)
        except Unacceptable as err:
            return _json({"error": {"message": str(err)}}, 400)
        except KeyError as err:
            message = f"1 validation error: {err} is missing"
            return _json({"object": "error", "message": message, "type": "Bad Request", "code": 400}, 400)
        except (OutsideVocabulary, _Death):
            self._die()
            return _hang_up(request)
        return _hang_up(request) if self._dead else answer

    def _make_routes(self) -> dict[str, dict[str, Handler]]:
        get: dict[str, Handler] = {
            "/health": self._health,
            "/health_generate": self._health,
            "/ready": self._ready,
            "/model_info": self._model_info,
            "/get_model_info": self._model_info,
            "/server_info": self._server_info,
            "/get_server_info": self._server_info,
            "/v1/loads": self._loads,
            "/flush_cache": self._flush_cache,
        }
        if self._behaviour.metrics:
            get["/metrics"] = self._metrics
        post: dict[str, Handler] = {
            "/generate": self._generate,
            "/flush_cache": self._flush_cache,
            "/abort_request": self._abort_request,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/begin_weight_update": self._begin_update,
            "/end_weight_update": self._end_update,
            "/init_weights_update_group": self._init_group,
            "/destroy_weights_update_group": self._destroy_group,
            "/update_weights_from_distributed": self._update_from_distributed,
            "/update_weights_from_tensor": self._update_from_tensor,
            "/update_weights_from_disk": self._update_from_disk,
            "/update_weight_version": self._update_version,
            "/weights_checker": self._check_weights,
        }
        paths = get.keys() | post.keys()
        tables = {"GET": get, "POST": post}
        return {path: {m: t[path] for m, t in tables.items() if path in t} for path in paths}

    # ---- generation

    async def _generate(self, body: Body) -> web.Response:
        call = self._generation.read(body)
        for request in call.requests:
            if request.rid in self._abort_sent:
                raise Unacceptable(f"Duplicate request ID detected: {request.rid}")
        self._abort_sent |= {request.rid: False for request in call.requests}
        try:
            while not (self._unpaused.is_set() and self._not_updating.is_set()):
                await self._unpaused.wait()
                await self._not_updating.wait()
            return self._spoil(call, await self._run(call))
        finally:
            for request in call.requests:
                del self._abort_sent[request.rid]

    async def _run(self, call: Call) -> list[Outcome]:
        self._num_inside += 1
        self._idle.clear()
        try:
            for request in call.requests:
                self._scheduler.add(request)
            return [await request.done for request in call.requests]
        except asyncio.CancelledError:  # the client went away
            self._scheduler.abort([request for request in call.requests if request.state != "over"])
            raise
        finally:
            self._num_inside -= 1
            if not self._num_inside:
                self._idle.set()

    def _spoil(self, call: Call, outcomes: list[Outcome]) -> web.Response:
        """The answer, unless a fault makes it garbage."""
        answer = self._generation.answer(call, outcomes)
        answers = answer if call.is_list else [answer]
        if self._behaviour.metrics:
            for one, request, outcome in zip(answers, call.requests, outcomes, strict=True):
                one["meta_info"] |= times_of(request, outcome, self._loop.time())
        fault = self._faults.strike("garbage")
        if fault is None:
            return _json(answer)
        meta = answers[0]["meta_info"]
        match fault.get("how", "truncated"):
            case "truncated":
                data = dumps(answer)
                return web.Response(body=data[: len(data) // 2], content_type="application/json")
            case "length":
                meta["output_token_logprobs"] = meta.get("output_token_logprobs", [])[:-1]
            case "logprobs":
                meta["output_token_logprobs"] = [
                    [None, *row[1:]] for row in meta.get("output_token_logprobs", [])
                ]
            case "experts":
                meta.pop("routed_experts", None)
        return _json(answer)

    async def _abort_request(self, body: Body) -> web.Response:
        rid = body.get("rid") or ""
        if body.get("abort_all"):
            self._abort(list(self._scheduler.requests()))
        elif rid and self._abort_sent.get(rid) is False:
            self._abort_sent[rid] = True
            self._abort([r for r in self._scheduler.requests() if r.rid.startswith(rid)])
        return web.Response()

    def _abort(self, requests: list[Request]) -> None:
        """In a pause that keeps requests in place, what runs is aborted when that ends."""
        if not self._unpaused.is_set():
            self._aborts_in_pause += [r for r in requests if r.state != "waiting"]
            requests = [r for r in requests if r.state == "waiting"]
        self._scheduler.abort(requests)

    async def _pause(self, body: Body) -> web.Response:
        mode = body.get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            return _json({"object": "error", "message": f"mode = {mode!r}", "type": "Bad Request"}, 400)
        async with self._control:
            await self._awake.wait()
            if mode == "abort":
                self._scheduler.abort(list(self._scheduler.requests()))
                self._unpaused.clear()
                while not self._idle.is_set():
                    await asyncio.sleep(PAUSE_POLL_S / self._behaviour.speedup)
                    self._scheduler.abort(list(self._scheduler.requests()))
            else:
                self._unpaused.clear()
                self._scheduler.stall("pause")
                if mode == "retract":
                    self._scheduler.retract_all()
        return _json({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, _: Body) -> web.Response:
        async with self._control:
            await self._awake.wait()
            self._unpaused.set()
            self._scheduler.resume("pause")
            self._scheduler.abort([r for r in self._aborts_in_pause if r.state != "over"])
            self._aborts_in_pause = []
        return _json({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush_cache(self, body: Body) -> web.Response:
        """With `timeout`, seconds, it waits for the requests to end."""
        await self._awake.wait()
        timeout_s = float(body.get("timeout", 0))
        deadline = self._loop.time() + timeout_s
        while not self._flush():
            if self._loop.time() >= deadline:
                why = "Timed out waiting for idle state." if timeout_s else "Flush cache failed.\n"
                return web.Response(text=why, status=400)
            await asyncio.sleep(FLUSH_POLL_S)
        return web.Response(
            text="Cache flushed.\nPlease check backend logs for more details. (When there are running or waiting "
            "requests, the operation will not be performed.)\n"
        )

    def _flush(self) -> bool:
        waiting = self._scheduler.num_waiting and self._unpaused.is_set()
        if self._scheduler.num_running or waiting:
            return False
        self._generation.forget_prefixes()
        return True

    # ---- weights

    @asynccontextmanager
    async def _exclusively(self) -> AsyncIterator[None]:
        """While it is paused, or with nothing inside; others then wait outside."""
        async with self._control:
            await self._awake.wait()
            if not self._unpaused.is_set():
                yield
                return
            self._not_updating.clear()
        try:
            await self._idle.wait()
            yield
        finally:
            self._not_updating.set()

    async def _in_thread(self, work: Callable[..., None], *arguments: Any) -> None:
        await self._loop.run_in_executor(self._thread, work, *arguments)

    async def _begin_update(self, _: Body) -> web.Response:
        async with self._exclusively():
            if self._in_session:
                raise Refused("a weight-update session is already open; call end_weight_update() first")
            self._in_session, self._bucket = True, 0
        return _json({"success": True, "message": "Success"})

    async def _end_update(self, _: Body) -> web.Response:
        async with self._exclusively():
            if not self._in_session:
                raise Refused("no weight-update session is open; call begin_weight_update() first")
            self._in_session = False
        return _json({"success": True, "message": "Success"})

    async def _init_group(self, body: Body) -> web.Response:
        await self._awake.wait()
        await self._in_thread(self._weights.join, body)
        return _json({"success": True, "message": "Succeeded to initialize custom process group."})

    async def _destroy_group(self, body: Body) -> web.Response:
        await self._awake.wait()
        await self._in_thread(self._weights.leave, body.get("group_name", "weight_update_group"))
        return _json({"success": True, "message": "Succeeded to destroy custom process group."})

    async def _update_from_distributed(self, body: Body) -> web.Response:
        receive = partial(self._weights.receive, body, keep=self._faults.find("stale_weights") is None)
        return await self._update("update_weights_from_distributed", body, receive)

    async def _update_from_tensor(self, body: Body) -> web.Response:
        keep = self._faults.find("stale_weights") is None
        unpack = partial(
            self._weights.unpack, body["serialized_named_tensors"], body.get("load_format"), keep=keep
        )
        return await self._update("update_weights_from_tensor", body, unpack)

    async def _update(self, what: str, body: Body, work: Callable[[], None]) -> web.Response:
        if body.get("abort_all_requests"):
            self._abort(list(self._scheduler.requests()))
        async with self._exclusively():
            if not self._in_session:
                raise Refused(f"{what} must run between begin_weight_update() and end_weight_update()")
            self._bucket += 1
            if self._faults.find("die", bucket=self._bucket):
                raise _Death
            if self._faults.find("freeze", bucket=self._bucket):
                self._awake.clear()
                self._scheduler.stall("freeze")
            await self._awake.wait()
            await self._in_thread(work)
            message = "Succeeded to update parameter online."
            return self._updated(message if what.endswith("distributed") else "Success", body)

    async def _update_from_disk(self, body: Body) -> web.Response:
        async with self._exclusively():
            if self._faults.find("stale_weights") is None:
                await self._in_thread(self._weights.load, Path(body["model_path"]))
            return self._updated("Succeeded to update model weights.", body, num_paused_requests=0)

    def _updated(self, message: str, body: Body, **more: Any) -> web.Response:
        label = body.get("weight_version")
        if label is not None:
            self._relabel(label)
            message += f" Weight version updated to {label}."
        if body.get("flush_cache", True) and not self._flush():
            raise Refused(
                "Weights were updated, but the cache was not flushed because requests are still running or queued. "
                "Retract or finish them, then call /flush_cache."
            )
        return _json({"success": True, "message": message, **more})

    async def _update_version(self, body: Body) -> web.Response:
        if body.get("abort_all_requests", True):
            self._abort(list(self._scheduler.requests()))
        await self._awake.wait()
        label = body["new_version"]
        self._relabel(label)
        message = f"Weight version updated to {label}"
        return _json({"success": True, "message": message, "new_version": label})

    def _relabel(self, label: str) -> None:
        self._label = label
        wrong, stale = self._faults.find("wrong_version"), self._faults.find("stale_weights")
        version = self._scheduler.version if stale else version_number(label)
        self._scheduler.change_weights(str(wrong["label"]) if wrong else label, version)

    async def _check_weights(self, body: Body) -> web.Response:
        await self._awake.wait()
        action = body.get("action", "checksum")
        if action != "checksum":
            raise Refused(f"Unsupported action={action!r}")
        report = await self._loop.run_in_executor(self._thread, self._weights.report)
        return _json({"success": True, "message": "Success.", **report})

    # ---- what it says about itself

    async def _health(self, _: Body) -> web.Response:
        """A real server generates one token, for which it needs to be neither paused nor frozen."""
        deadline = self._loop.time() + HEALTH_CHECK_S / self._behaviour.speedup
        while not (self._unpaused.is_set() and self._awake.is_set()):
            if self._loop.time() > deadline:
                return web.Response(status=503)
            await asyncio.sleep(0.05)
        return web.Response()

    async def _ready(self, _: Body) -> web.Response:
        return web.Response(status=200 if self._unpaused.is_set() else 503)

    async def _model_info(self, _: Body) -> web.Response:
        return _json(reports.model_info(self._model, self._scheduler.label))

    async def _server_info(self, _: Body) -> web.Response:
        await self._awake.wait()
        info = reports.server_info(self._model, self._behaviour, self._context_length, self._scheduler)
        return _json(info | {"startup_time": reports.startup_time(self._startup_s)})

    async def _loads(self, _: Body) -> web.Response:
        return _json(reports.loads(self._scheduler))

    async def _metrics(self, _: Body) -> web.Response:
        return web.Response(text=reports.metrics(self._scheduler, self._model))

    # ---- faults

    def _simulate(self, body: Body) -> web.Response:
        """POST /simulate: suffer a fault; GET: nothing.  Either tells the state."""
        if body:
            try:
                self._suffer(body)
            except ValueError as err:
                return _json({"error": {"message": str(err)}}, 400)
        return _json(
            {
                "dead": self._dead,
                "label": self._label,
                "served_version": self._scheduler.version,
                "running": self._scheduler.num_running,
                "waiting": self._scheduler.num_waiting,
                "held_back": len(self._abort_sent)
                - self._scheduler.num_running
                - self._scheduler.num_waiting,
                "sampled_tokens": self._scheduler.num_decoded,
                "prefilled_tokens": self._scheduler.num_prefilled,
                "ended": self._scheduler.num_ended,
                "aborted": self._scheduler.num_aborted,
                "retracted": self._scheduler.num_retracted,
                "received_bytes": self._weights.num_bytes,
                "faults": self._faults.active(),
            }
        )

    def _suffer(self, fault: Mapping[str, Any]) -> None:
        kind = fault.get("fault")
        if kind == "revive":
            self._begin_life(str(fault.get("weight_version", self._behaviour.weight_version)))
            return
        self._faults.add(fault)
        match kind:
            case "heal":
                self._scheduler.slow_down(1.0)
                self._scheduler.resume("hang")
                self._scheduler.resume("freeze")
                self._awake.set()
                self._relabel(self._label)
            case "die" if "after_tokens" in fault:
                task = self._loop.create_task(self._die_after(self._scheduler, fault["after_tokens"]))
                task.add_done_callback(lambda _: None)
            case "die" if "bucket" not in fault:
                self._loop.call_soon(self._die)
            case "hang":
                self._scheduler.stall("hang")
            case "slow":
                self._scheduler.slow_down(fault["factor"])
            case "wrong_version":
                self._relabel(self._label)

    async def _die_after(self, life: Scheduler, num_tokens: int) -> None:
        end = life.num_decoded + num_tokens
        while life.num_decoded < end:
            await asyncio.sleep(0.002)
        if life is self._scheduler:
            self._die()

    def _die(self) -> None:
        """Leave no answer: end the process, or every connection where other engines live in it."""
        if self._alone:
            os.kill(os.getpid(), signal.SIGKILL)
        self._dead = True
        self._scheduler.stall("dead")
        for connection in list(self.server.connections):
            if connection.transport is not None:
                connection.transport.abort()


class _Death(Exception):
    """A fault says that the engine dies here."""


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def _request(
    loop: asyncio.AbstractEventLoop, message: Any, payload: Any, protocol: Any, writer: Any, task: Any
):
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=MAX_BODY_BYTES)


async def _body(request: web.BaseRequest) -> Body:
    data = await request.read()
    return loads(data) if data else {}


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=dumps(value), status=status, content_type="application/json")


def _hang_up(request: web.BaseRequest) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
