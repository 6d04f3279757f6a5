"""What an engine is asked for: the responses of one prompt, across interruptions, and the scores of one sequence.

A request is posted to an engine and read; whoever posts it decides where, and what happens when that fails (fleet.py).

A response that comes back unfinished is a *draft*: it keeps its tokens, their log-probs and versions, and the experts of
the pass that sampled them, and goes on from there.  The last token of a part never went through the model, so it has no
row of experts yet; it gets one from the continuation, whose first row it is:

    part 1   P given, A sampled          rows 0 .. P + A - 2
    part 2   P + A given, B sampled      rows P + A - 1 .. P + A + B - 2, asked for from there on
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import orjson
from tokenizers import Tokenizer

from megatron_vespo.rollout.answers import (
    Asked,
    Part,
    parse_candidate,
    parse_json,
    parse_parts,
    parse_scored,
    version_of,
    was_interrupted,
)
from megatron_vespo.rollout.failures import Aborted, Moved
from megatron_vespo.rollout.model import ModelFacts, read_facts
from megatron_vespo.types import (
    Floats,
    Ints,
    Prompt,
    Response,
    RunError,
    Sampling,
    Scored,
    TrainSequence,
    VersionSpan,
)

T = TypeVar("T", covariant=True)
R = TypeVar("R")
Post = Callable[[dict[str, Any], int], Awaitable[bytes]]
"""Posts the fields of a request for so many sequences to one engine, and returns the body of its answer."""

COMPUTED_ONCE_FROM_TOKENS = 2048
"""A prompt is computed before its responses begin where that saves so many tokens: SGLang takes sequences that come
together into one batch, where each would compute the whole prompt (its own `n` prevents that, but such responses have no
names, so they could not be aborted)."""
PREFIXES_PER_REQUEST = 32
IN_A_THREAD_FROM_BYTES = 256 * 1024
"""Reading a larger answer takes milliseconds, for which the loop does not wait."""


@dataclass(frozen=True)
class Answered(Generic[T]):
    """What a request came to at one engine, and the weight versions in it."""

    value: T
    oldest: int
    newest: int
    was_retracted: bool = False
    """The engine ran out of key-value cache for it."""


class Request(Protocol[T]):
    """Something to be asked of any one engine."""

    who: str
    """Names it in errors: "prompt 'p7'"."""
    uid: str
    """Names its prefix."""

    def interrupt(self) -> None:
        """An engine failed with it, and it is asked again."""
        ...

    @property
    def num(self) -> int:
        """Sequences that an engine needs room for."""
        ...

    async def at(self, post: Post) -> Answered[T]:
        """Ask one engine.

        Raises:
            Unusable: it answered something impossible.
            EngineFailure: it gave the request back with nothing done.
        """
        ...


@dataclass(frozen=True)
class ServedModel:
    """The model behind all engines, and what is recorded of it."""

    facts: ModelFacts
    tokenizer: Tokenizer
    record_experts: bool

    @classmethod
    def read(cls, model: Path, *, record_experts: bool) -> ServedModel:
        """Read a Hugging Face directory.

        Raises:
            ConfigError: a file is missing, or no end-of-turn token is named anywhere.
        """
        facts = read_facts(model)
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        return cls(facts, tokenizer, record_experts and facts.is_moe)


class Draft:
    """One response while it is sampled."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.num_tokens = 0
        self.num_rows = 0
        self.num_resumed = 0
        self.engine = ""

    @property
    def is_finished(self) -> bool:
        return bool(self.parts) and self.parts[-1].finish_reason != "abort"

    @property
    def token_ids(self) -> Ints:
        return np.concatenate([part.token_ids for part in self.parts] or [np.empty(0, np.int32)])

    def take(self, part: Part, first_row: int, engine: str) -> None:
        """Add what an engine sampled; rows of tokens that have one already are those of a later pass, and dropped."""
        self.engine = engine
        if len(part.token_ids):
            if part.experts is not None:
                new = part.experts[self.num_rows - first_row :]
                part = replace(part, experts=new)
                self.num_rows += len(new)
            self.parts.append(part)
            self.num_tokens += len(part.token_ids)
        if not self.is_finished:
            self.interrupt()

    def interrupt(self) -> None:
        """It has to be sent again; that counts if there is something to keep."""
        self.num_resumed += self.num_tokens > 0

    def response(self, tokenizer: Tokenizer) -> Response:
        token_ids, last = self.token_ids, self.parts[-1]
        text = last.text
        if len(self.parts) > 1:  # a character may have been cut in two
            kept = token_ids[:-1] if last.finish_reason == "stop" else token_ids
            text = tokenizer.decode(kept.tolist(), skip_special_tokens=True)
        experts = [part.experts for part in self.parts if part.experts is not None]
        return Response(
            token_ids=token_ids,
            text=text,
            behavior_logp=np.concatenate([part.logp for part in self.parts]),
            spans=_join([part.spans for part in self.parts]),
            experts=np.concatenate(experts) if experts else None,
            finish_reason=last.finish_reason,
            num_resumed=self.num_resumed,
            engine=self.engine,
        )


class Group:
    """The responses of one prompt: a request for those that are not finished yet, until none is left."""

    def __init__(self, prompt: Prompt, num: int, sampling: Sampling, model: ServedModel) -> None:
        self.who = f"prompt '{prompt.uid}'"
        if prompt.token_ids.max(initial=0) >= model.facts.vocab_size:
            raise RunError(
                f"{self.who} = token id {prompt.token_ids.max()}: expected ids below {model.facts.vocab_size}, the model's "
                "vocabulary, because SGLang dies of others; mend the tokenizer, or the environment that wrote it"
            )
        self.uid = prompt.uid
        self.drafts = [Draft() for _ in range(num)]
        self.unfinished = list(self.drafts)
        self._prompt = prompt.token_ids
        self._sampling = sampling
        self._model = model

    @property
    def num(self) -> int:
        return len(self.unfinished)

    async def at(self, post: Post) -> Answered[list[Part]]:
        asked = self._asked()
        if (self.num - 1) * len(self._prompt) >= COMPUTED_ONCE_FROM_TOKENS:
            await post({"input_ids": [_json(self._prompt)], "sampling_params": {"max_new_tokens": 0}}, 1)
        body = await post(self._fields(asked), self.num)
        model = self._model
        parts = await _read(body, parse_parts, asked, model.facts, model.record_experts)
        if not any(len(part.token_ids) for part in parts):
            raise Aborted(f"gave {len(parts)} response(s) back before their first token")
        versions = [span.version for part in parts for span in part.spans]
        retracted = any(part.num_retractions and len(part.spans) == 1 for part in parts)  # else: by a push
        return Answered(parts, min(versions), max(versions), retracted)

    def take(self, parts: Sequence[Part], engine: str) -> None:
        """Keep what an engine sampled for the unfinished ones, in their order."""
        first_row = self._first_row
        for draft, part in zip(self.unfinished, parts, strict=True):
            draft.take(part, first_row, engine)
        self.unfinished = [draft for draft in self.unfinished if not draft.is_finished]

    def interrupt(self) -> None:
        """An engine failed with it."""
        for draft in self.unfinished:
            draft.interrupt()

    def responses(self) -> tuple[Response, ...]:
        return tuple(draft.response(self._model.tokenizer) for draft in self.drafts)

    @property
    def _first_row(self) -> int:
        return min(draft.num_rows for draft in self.unfinished)

    def _asked(self) -> list[Asked]:
        limit, num_prompt, first_row = self._sampling.max_tokens, len(self._prompt), self._first_row
        return [
            Asked(
                num_prefix=num_prompt + draft.num_tokens,
                limit=limit - draft.num_tokens,
                first_row=first_row,
            )
            for draft in self.unfinished
        ]

    def _fields(self, asked: Sequence[Asked]) -> dict[str, Any]:
        prompt = _json(self._prompt)
        prefixes = [
            _json(np.concatenate([self._prompt, draft.token_ids])) if draft.num_tokens else prompt
            for draft in self.unfinished
        ]
        params = {
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "top_k": -1,
            "stop_token_ids": self._model.facts.stop_token_ids,
        }
        return {
            "input_ids": prefixes,
            "sampling_params": [{**params, "max_new_tokens": wanted.limit} for wanted in asked],
            "return_logprob": True,
            "return_routed_experts": self._model.record_experts,
            "routed_experts_start_len": asked[0].first_row,
        }


class Scoring:
    """The scores of one given sequence, all under one weight version.

    SGLang ignores the temperature for tokens that it is given.  At another temperature than 1 every response token
    therefore costs one request more, for the log-prob of that token after its prefix.
    """

    def __init__(self, sequence: TrainSequence, temperature: float, model: ServedModel) -> None:
        self.who = f"scoring of '{sequence.uid}'"
        self.uid = sequence.uid
        self._ids: list[int] = sequence.token_ids.tolist()
        self._num_prompt = sequence.num_prompt_tokens
        self._temperature = temperature
        self._model = model

    @property
    def num(self) -> int:
        if self._temperature == 1.0:
            return 1
        return max(1, min(PREFIXES_PER_REQUEST, len(self._ids) - self._num_prompt))

    async def at(self, post: Post) -> Answered[Scored]:
        fields = {
            "input_ids": [self._ids],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,  # also keeps cached prefixes out: every row is computed now
            "return_routed_experts": self._model.record_experts,
        }
        (answer,) = await self._post(post, fields, 1)
        model, version = self._model, version_of(answer)
        scored = parse_scored(answer, self._ids, self._num_prompt, model.facts, model.record_experts)
        if self._temperature != 1.0:
            scored = Scored(logp=await self._at_temperature(post, version), experts=scored.experts)
        return Answered(scored, version, version)

    def interrupt(self) -> None:
        """Nothing of it is kept."""

    async def _at_temperature(self, post: Post, version: int) -> Floats:
        """[T], each token as the one candidate of interest after its prefix."""
        ids, logp = self._ids, list[float]()
        for start in range(self._num_prompt, len(ids), PREFIXES_PER_REQUEST):
            ends = range(start, min(start + PREFIXES_PER_REQUEST, len(ids)))
            fields = {
                "input_ids": [ids[:end] for end in ends],
                "sampling_params": {"max_new_tokens": 1, "temperature": self._temperature},
                "return_logprob": True,
                "token_ids_logprob": [[ids[end]] for end in ends],
            }
            for end, answer in zip(ends, await self._post(post, fields, len(ends)), strict=True):
                if version_of(answer) != version:
                    raise Moved(f"went from version {version} to {version_of(answer)} while it scored")
                logp.append(parse_candidate(answer, ids[end]))
        return np.array(logp, np.float32)

    async def _post(self, post: Post, fields: dict[str, Any], num: int) -> list[Any]:
        answers = await _read(await post(fields, num), parse_json, num)
        if any(was_interrupted(answer) for answer in answers):
            raise Aborted("gave a scoring back")
        return answers


async def _read(body: bytes, parse: Callable[..., R], *args: Any) -> R:
    if len(body) < IN_A_THREAD_FROM_BYTES:
        return parse(body, *args)
    return await asyncio.to_thread(parse, body, *args)


def _json(ids: Ints) -> orjson.Fragment:
    return orjson.Fragment(orjson.dumps(np.ascontiguousarray(ids), option=orjson.OPT_SERIALIZE_NUMPY))


def _join(parts: Sequence[tuple[VersionSpan, ...]]) -> tuple[VersionSpan, ...]:
    """Spans of parts that follow one another; neighbours of one version become one."""
    joined, offset = list[VersionSpan](), 0
    for spans in parts:
        for span in spans:
            start = offset + span.start
            if joined and joined[-1].version == span.version:
                start = joined.pop().start
            joined.append(VersionSpan(version=span.version, start=start, end=offset + span.end))
        offset += spans[-1].end
    return tuple(joined)
