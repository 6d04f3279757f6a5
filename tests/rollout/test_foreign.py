"""A server of somebody else: what it must say, and what is done where it does not."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import asynccontextmanager

import numpy as np
import pytest
from aiohttp import web

from megatron_vespo.config import ConfigError
from megatron_vespo.data.demo import write_tiny_model
from megatron_vespo.rollout.client import open_pool
from megatron_vespo.rollout.foreign import ForeignServer
from megatron_vespo.types import Prompt, RunError, Sampling, TrainSequence

PROMPT = Prompt(uid="p", token_ids=np.array([5, 6, 7], np.int32), text="", answer="")
ROW = [[0, 1], [2, 3], [4, 5], [6, 7]]
"""Experts of one token in 4 layers."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("foreign") / "model"
    write_tiny_model(directory, seed=0)
    return directory


def experts(num_rows):
    return base64.b64encode(np.array([ROW] * num_rows, "<i4").tobytes()).decode()


class Stock:
    """What a stock server answers; tests change it."""

    def __init__(self, model):
        self.model_info = {
            "model_path": str(model),
            "architectures": ["Qwen3MoeForCausalLM"],
            "weight_version": "default",
        }
        self.server_info = {
            "dtype": "bfloat16",
            "version": "0.5.23",
            "context_length": 99,
            "enable_return_routed_experts": True,
        }
        self.labels = ["default"]
        """Of the weights, in the answers one after the other; the last one stays."""
        self.logprobs = True
        self.asked = []

    async def generate(self, request):
        fields = await request.json()
        self.asked.append(fields)
        (ids,) = fields["input_ids"]
        label = self.labels.pop(0) if len(self.labels) > 1 else self.labels[0]
        meta = {"weight_version": label, "prompt_tokens": len(ids), "finish_reason": {"type": "length"}}
        if "logprob_start_len" in fields:
            meta["input_token_logprobs"] = [[None if p == 0 else -0.25, i] for p, i in enumerate(ids)]
            rows, new = len(ids) - 1, []
        else:
            new = [8, 9]
            meta["weight_versions"] = [{"version": label, "start": 0, "end": 2}]
            meta["output_token_logprobs"] = [[-0.5, i, None] for i in new]
            rows = len(ids) + 1
        if fields.get("return_routed_experts"):
            meta["routed_experts"] = experts(rows)
        if not self.logprobs:
            del meta["output_token_logprobs"]
        return web.json_response([{"text": "", "output_ids": new, "meta_info": meta}])

    async def tell_model(self, request):
        return web.json_response(self.model_info, status=200 if self.model_info else 404)

    async def tell_server(self, request):
        return web.json_response(self.server_info)

    @asynccontextmanager
    async def serving(self, model):
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/model_info", self.tell_model)
        app.router.add_get("/server_info", self.tell_server)
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        try:
            async with open_pool() as pool:
                yield ForeignServer(f"http://127.0.0.1:{port}/", pool, model)
        finally:
            await runner.cleanup()


@pytest.fixture
def stock(model):
    return Stock(model)


def ask(stock, model, work):
    async def main():
        async with stock.serving(model) as server:
            return await work(server)

    return asyncio.run(main())


async def sampled(server):
    await server.inspect()
    return await server.sample(PROMPT, 1, Sampling(temperature=1.0, max_tokens=2))


def test_a_stock_server_is_sampled_and_scored_whatever_it_calls_its_weights(stock, model):
    async def both(server):
        (response,) = await sampled(server)
        ids = np.concatenate([PROMPT.token_ids, response.token_ids])
        sequence = TrainSequence(uid="s", token_ids=ids, num_prompt_tokens=3)
        return response, await server.score(sequence, 1.0)

    response, scored = ask(stock, model, both)

    assert response.token_ids.tolist() == [8, 9] and response.behavior_logp.tolist() == [-0.5, -0.5]
    assert response.versions.tolist() == [0, 0]
    assert response.experts.tolist() == [ROW] * 4
    assert scored.logp.tolist() == [-0.25, -0.25] and scored.experts.tolist() == [ROW] * 4


def test_it_says_what_it_serves(stock, model):
    served = ask(stock, model, lambda server: server.inspect())

    assert (served.weights, served.dtype, served.sglang, served.context_length) == (
        "default", "bfloat16", "0.5.23", 99,
    )  # fmt: skip
    assert served.records_experts


def test_experts_are_not_asked_for_where_the_server_was_started_without(stock, model):
    stock.server_info["enable_return_routed_experts"] = False

    (response,) = ask(stock, model, sampled)

    assert response.experts is None
    assert not stock.asked[0]["return_routed_experts"]


def test_a_push_in_between_ends_it(stock, model):
    stock.labels = ["default", "7"]

    async def twice(server):
        await sampled(server)
        await server.sample(PROMPT, 1, Sampling(temperature=1.0, max_tokens=2))

    with pytest.raises(RunError, match=r"weights '7': were 'default' .*nobody pushes weights to"):
        ask(stock, model, twice)


def test_a_server_without_log_probs_is_named_so(stock, model):
    stock.logprobs = False

    with pytest.raises(
        RunError, match=r"prompt 'p' = unusable: 'output_token_logprobs'.*stock SGLang with log-probs"
    ):
        ask(stock, model, sampled)


def test_nobody_there(model):
    async def inspect():
        async with open_pool() as pool:
            await ForeignServer("http://127.0.0.1:1", pool, model).inspect()

    with pytest.raises(
        RunError, match=r"engine 'http://127.0.0.1:1' = .*; expected an SGLang server there; start it"
    ):
        asyncio.run(inspect())


def test_something_else_there(stock, model):
    stock.model_info = None

    with pytest.raises(RunError, match=r"/model_info' = HTTP 404: expected what SGLang"):
        ask(stock, model, lambda server: server.inspect())


def test_another_family_is_refused(stock, model):
    stock.model_info["architectures"] = ["Qwen3ForCausalLM"]

    with pytest.raises(ConfigError, match=r"serves Qwen3ForCausalLM .*: expected Qwen3MoeForCausalLM"):
        ask(stock, model, lambda server: server.inspect())


def test_another_size_is_refused_where_its_files_can_be_seen(stock, model, tmp_path):
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 300, "num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stock.model_info["model_path"] = str(tmp_path)

    with pytest.raises(ConfigError, match=r"vocab_size = 300 \(here 264\), num_hidden_layers = 6 \(here 4\)"):
        ask(stock, model, lambda server: server.inspect())


def test_a_model_whose_files_are_elsewhere_is_believed(stock, model):
    stock.model_info["model_path"] = "somebody/some-model"

    assert ask(stock, model, lambda server: server.inspect()).model == "somebody/some-model"
