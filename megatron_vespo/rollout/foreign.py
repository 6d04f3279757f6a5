"""One SGLang server that somebody else runs, as it is: asked what it serves, sampled from, and given sequences to score.

Nothing is pushed to it, nothing is retried, and its own name for its weights ("default", say) stands for one version: 0.
A fleet over servers of ours is fleet.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import orjson

from megatron_vespo.config import ConfigError
from megatron_vespo.rollout.client import EngineClient
from megatron_vespo.rollout.failures import EngineFailure
from megatron_vespo.rollout.inquiry import Answered, Group, Request, Scoring, ServedModel
from megatron_vespo.types import Prompt, Response, RunError, Sampling, Scored, TrainSequence

T = TypeVar("T")

INSPECT_WITHIN_S = 30.0
_SHAPE = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "num_experts", "num_experts_per_tok",
)  # fmt: skip
"""Fields of config.json that are the same in two versions of one model."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server says of itself."""

    model: str
    """Path or name, as it was started with."""
    architectures: tuple[str, ...]
    """Empty where it does not say."""
    weights: str
    """Its name for them."""
    dtype: str
    """"float32", "bfloat16", "auto", ..."""
    sglang: str
    """Version."""
    context_length: int | None
    """Longest prompt and response together, tokens; None where it does not say."""
    records_experts: bool
    """Whether it was started with --enable-return-routed-experts."""


class ForeignServer:
    """`inspect` comes first."""

    def __init__(
        self,
        url: str,
        pool: aiohttp.ClientSession,
        model: Path,
        *,
        max_sequences: int = 64,
        request_timeout_s: float = 600.0,
    ) -> None:
        """
        Args:
            model: Hugging Face directory of the model that it is meant to serve.
            max_sequences: that it is asked about at one time.
        """
        self.url = url.rstrip("/")
        self._pool, self._directory = pool, model
        self._client = EngineClient(self.url, pool)
        self._room = asyncio.Semaphore(max_sequences)
        self._timeout_s = request_timeout_s
        self._model: ServedModel
        self._weights = ""

    async def inspect(self) -> Served:
        """What it serves.

        Raises:
            RunError: it does not answer, or not as SGLang does.
            ConfigError: it serves another model.
        """
        model, info = await self._get("/model_info"), await self._get("/server_info")
        served = Served(
            model=str(model.get("model_path")),
            architectures=tuple(model.get("architectures") or ()),
            weights=str(model.get("weight_version")),
            dtype=str(info.get("dtype")),
            sglang=str(info.get("version")),
            context_length=info.get("context_length"),
            records_experts=bool(info.get("enable_return_routed_experts")),
        )
        self._check_model(served)
        self._model = ServedModel.read(self._directory, record_experts=served.records_experts)
        self._weights = served.weights
        return served

    @property
    def records_experts(self) -> bool:
        """Whether the answers hold the experts of every token."""
        return self._model.record_experts

    @property
    def is_moe(self) -> bool:
        return self._model.facts.is_moe

    async def sample(self, prompt: Prompt, num: int, sampling: Sampling) -> tuple[Response, ...]:
        """`num` responses to one prompt.

        Raises:
            RunError: it failed, or its weights are others than before.
        """
        group = Group(prompt, num, sampling, self._model)
        while group.unfinished:  # an interrupted one goes on where it was
            group.take(await self._ask(group), self.url)
        return group.responses()

    async def score(self, sequence: TrainSequence, temperature: float) -> Scored:
        """Log-probs and experts of a prefill of the whole sequence.

        Raises:
            RunError: as `sample`.
        """
        return await self._ask(Scoring(sequence, temperature, self._model))

    async def _ask(self, request: Request[T]) -> T:
        try:
            answered: Answered[T] = await request.at(self._post)
        except TimeoutError:
            raise RunError(
                f"engine '{self.url}', {request.who} = no answer within {self._timeout_s:g} s; ask for fewer tokens, or see "
                "the server's log"
            ) from None
        except EngineFailure as failure:
            raise RunError(
                f"engine '{self.url}', {request.who} = {failure.kind}: {failure}; the server must be a stock SGLang with "
                f"log-probs that serves '{self._directory}': see its log"
            ) from failure
        return answered.value

    async def _post(self, fields: dict[str, Any], num: int) -> bytes:
        async with self._room, asyncio.timeout(self._timeout_s):
            return self._as_version_zero(await self._client.generate(fields))

    def _as_version_zero(self, body: bytes) -> bytes:
        answers = orjson.loads(body)
        for answer in answers if isinstance(answers, list) else [answers]:
            meta = answer["meta_info"]
            spans = meta.get("weight_versions") or []
            for name in {meta.get("weight_version"), *(span["version"] for span in spans)}:
                if name != self._weights:
                    raise RunError(
                        f"engine '{self.url}' = weights '{name}': were '{self._weights}' when this began, expected the same to "
                        "the end; probe a server that nobody pushes weights to"
                    )
            meta["weight_version"] = "0"
            num = len(answer.get("output_ids") or ())
            meta["weight_versions"] = [{"version": "0", "start": 0, "end": num}]
        return orjson.dumps(answers)

    async def _get(self, path: str) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(INSPECT_WITHIN_S), self._pool.get(self.url + path) as answer:
                status, body = answer.status, await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as err:
            raise RunError(
                f"engine '{self.url}' = {type(err).__name__}: {err or 'no answer'}; expected an SGLang server there; start "
                "it, or give its url as http://host:port"
            ) from err
        try:
            found = orjson.loads(body) if status == 200 else None
        except orjson.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            raise RunError(
                f"engine '{self.url}{path}' = HTTP {status}: expected what SGLang (0.5.20 and newer) says of itself; "
                "give the url of such a server, not of a router in front of it"
            )
        return found

    def _check_model(self, served: Served) -> None:
        ours = json.loads((self._directory / "config.json").read_text())
        known = ours.get("architectures") or []
        if served.architectures and known and list(served.architectures) != list(known):
            raise ConfigError(
                f"engine '{self.url}' = serves {', '.join(served.architectures)} ('{served.model}'): expected "
                f"{', '.join(known)}, the model of '{self._directory}'; give the checkpoint that it serves"
            )
        config = Path(served.model) / "config.json"
        theirs = json.loads(config.read_text()) if config.is_file() else ours
        differ = [field for field in _SHAPE if theirs.get(field) != ours.get(field)]
        if differ:
            what = ", ".join(f"{field} = {theirs.get(field)} (here {ours.get(field)})" for field in differ)
            raise ConfigError(
                f"engine '{self.url}' = serves '{served.model}', {what}: expected the model of '{self._directory}'; give the "
                "checkpoint that it serves"
            )
