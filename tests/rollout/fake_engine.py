"""An engine that speaks SGLang's HTTP and does what a test tells it, in the test's own loop.

What it "computes" can be predicted by hand, so that a token, log-prob or row that was lost, doubled or taken from the
wrong pass shows:

    token      one more than the token before it, modulo 250; the first one of each fresh response is new
    log-prob   -(index in the response) / 1000 - version / 10
    experts    of token p: (p + version) % 8 and the next one, under the version that samples token p + 1
"""

from __future__ import annotations

import asyncio
import base64
import itertools

import numpy as np
from aiohttp import web

NUM_LAYERS, NUM_EXPERTS, STOP = 4, 8, 260
_first = itertools.count(0, 7)


def expected_logp(versions):
    return [-i / 1000 - v / 10 for i, v in enumerate(versions)]


def expected_experts(num_prompt, versions):
    rows = num_prompt + len(versions) - 1
    by = [versions[max(p + 1 - num_prompt, 0)] for p in range(rows)]
    return [[[(p + v) % 8, (p + v + 1) % 8]] * NUM_LAYERS for p, v in enumerate(by)]


class Sequence:
    """One sequence under way."""

    def __init__(self, engine, rid, prefix, limit):
        self.engine, self.rid, self.prefix, self.limit = engine, rid, prefix, limit
        self.ids, self.versions = [], []
        self.aborted = False

    @property
    def is_full(self):
        return len(self.ids) >= self.limit

    @property
    def may_go_on(self):
        stop_after = self.engine.stop_after
        return stop_after is None or len(self.ids) < stop_after

    async def run(self):
        while not self.is_full and not self.aborted:
            await self.engine.until(lambda: self.aborted or self.may_go_on)
            if not self.aborted:
                self.step()

    def step(self):
        continues = len(self.prefix) > self.engine.num_prompt or self.ids
        last = (self.ids or self.prefix)[-1]
        self.ids.append((last + 1 if continues else next(_first)) % 250)
        self.versions.append(self.engine.version)
        self.engine.num_tokens += 1

    def answer(self, first_row):
        offset = len(self.prefix) - self.engine.num_prompt
        spans, start = [], 0
        for version, group in itertools.groupby(self.versions):
            end = start + len(list(group))
            spans.append({"version": str(version), "start": start, "end": end})
            start = end
        meta = {
            "id": self.rid,
            "prompt_tokens": len(self.prefix),
            "finish_reason": {"type": "abort"} if self.aborted else {"type": "length", "length": self.limit},
            "weight_version": str(self.engine.version),
            "weight_versions": spans,
            "output_token_logprobs": [
                [-(offset + i) / 1000 - v / 10, token, None]
                for i, (token, v) in enumerate(zip(self.ids, self.versions, strict=True))
            ],
        }
        if self.versions:
            rows = expected_experts(len(self.prefix), self.versions)[first_row:]
            rows = np.array(rows, "<i4").reshape(-1, NUM_LAYERS, 2)
            meta["routed_experts"] = base64.b64encode(rows.tobytes()).decode()
        return {"text": "", "output_ids": self.ids, "meta_info": meta}


class FakeEngine:
    """An `EngineProcess`; every attribute may be changed at any time, `poke` has it looked at."""

    def __init__(self, name, *, num_prompt=3, version=0):
        self.name, self.num_prompt, self.version = name, num_prompt, version
        self.stop_after = None  # tokens of each request after which it waits
        self.script = []  # replies to the next requests of /generate: (status, body), or a function of an answer
        self.frozen = False  # counts nothing any more
        self.queue = 0
        self.start_failures = []
        self.healthy = True
        self.death = None
        self.num_tokens = self.num_starts = self.num_stops = 0
        self.requests, self.aborts = [], []
        self.running = {}
        self._poked = asyncio.Event()
        self._runner = None

    def poke(self):
        self._poked.set()
        self._poked = asyncio.Event()

    async def until(self, done):
        while not done():
            await self._poked.wait()
        await asyncio.sleep(0)

    # EngineProcess

    async def start(self):
        self.num_starts += 1
        if self.start_failures:
            raise self.start_failures.pop(0)
        self.death, self.frozen = None, False
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def stop(self):
        if self._runner is not None:
            self.num_stops += 1
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def death_report(self):
        return self.death

    async def die(self):
        """As a killed process: connections break, then its death shows."""
        runner, self._runner = self._runner, None
        await runner.cleanup()
        self.death = "was killed by SIGKILL; the end of its log:\nout of memory"

    def push(self, version):
        """What a weight push does."""
        self.version = version

    def give_back(self):
        for sequence in self.running.values():
            sequence.aborted = True
        self.poke()

    # HTTP

    async def _generate(self, request):
        fields = await request.json()
        self.requests.append(fields)
        reply = self.script.pop(0) if self.script else None
        if isinstance(reply, tuple):
            return web.json_response(reply[1], status=reply[0])
        params = fields["sampling_params"]
        params = params if isinstance(params, list) else [params] * len(fields["input_ids"])
        if "logprob_start_len" in fields:
            return web.json_response([self._scored(ids) for ids in fields["input_ids"]])
        sequences = [
            Sequence(self, rid, ids, p["max_new_tokens"])
            for rid, ids, p in zip(fields["rid"], fields["input_ids"], params, strict=True)
        ]
        self.running |= {s.rid: s for s in sequences}
        try:
            await asyncio.gather(*(s.run() for s in sequences))
        finally:
            for s in sequences:
                del self.running[s.rid]
        answers = [s.answer(fields.get("routed_experts_start_len", 0)) for s in sequences]
        return web.json_response(reply(answers) if reply else answers)

    def _scored(self, ids):
        rows = [
            [[(p + self.version) % 8, (p + self.version + 1) % 8]] * NUM_LAYERS for p in range(len(ids) - 1)
        ]
        return {
            "meta_info": {
                "finish_reason": {"type": "length", "length": 0},
                "weight_version": str(self.version),
                "input_token_logprobs": [[None if p == 0 else -self.version / 10, i] for p, i in enumerate(ids)],
                "routed_experts": base64.b64encode(np.array(rows, "<i4").tobytes()).decode(),
            }
        }  # fmt: skip

    async def _abort(self, request):
        rid = (await request.json())["rid"]
        self.aborts.append(rid)
        if rid in self.running:
            self.running[rid].aborted = True
            self.poke()
        return web.Response()

    async def _loads(self, request):
        rank = {
            "num_running_reqs": len(self.running),
            "num_waiting_reqs": self.queue,
            "num_used_tokens": 0 if self.frozen else self.num_tokens,
            "total_prefill_uncached_tokens": 0,
            "gen_throughput": 1.0,
            "decode_moments": [],
        }
        return web.json_response({"loads": [rank]})

    async def _health(self, request):
        return web.Response(status=200 if self.healthy and not self.frozen else 503)
