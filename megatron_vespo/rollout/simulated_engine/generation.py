"""From a body of POST /generate to requests, and from finished requests to the answer."""

from __future__ import annotations

import base64
import time
import uuid
from asyncio import AbstractEventLoop
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.rollout.simulated_engine.content import Content, simulated_logp
from megatron_vespo.rollout.simulated_engine.scheduler import Outcome, Request

NO_LIMIT = 1 << 40


class Unacceptable(Exception):
    """Answered with HTTP 400."""


class OutsideVocabulary(Exception):
    """The real engine dies of it."""


@dataclass(frozen=True)
class Call:
    """One body of /generate."""

    requests: tuple[Request, ...]
    is_list: bool
    """Whether the answer is one, even of one element."""
    body: Mapping[str, Any]
    temperature: float


class Generation:
    """The requests of one engine."""

    def __init__(self, content: Content, context_length: int, loop: AbstractEventLoop) -> None:
        self._content = content
        self._context_length = context_length
        self._loop = loop
        self._cached: set[int] = set()
        self._singles: Counter[int] = Counter()
        """Requests for one sample, by prompt: the next one is for the next sample."""

    def forget_prefixes(self) -> None:
        self._cached.clear()

    def read(self, body: Mapping[str, Any]) -> Call:
        """
        Raises:
            Unacceptable: as the real server refuses it.
            OutsideVocabulary: a token id does not exist.
        """
        given = body.get("input_ids")
        if given is None:
            raise Unacceptable(
                "Either text, input_ids or input_embeds should be provided (simulated: input_ids)."
            )
        if not isinstance(given, list):
            raise Unacceptable(f"input_ids must be list or null; got {type(given).__name__}")
        if not given:
            raise Unacceptable("input_ids cannot be empty.")
        batched = isinstance(given[0], list)
        prompts = given if batched else [given]
        params = body.get("sampling_params") or {}
        params = params if isinstance(params, list) else [params] * len(prompts)
        num = params[0].get("n", 1) or 1
        requests: list[Request] = []
        seen = Counter[int]() if batched or num > 1 else self._singles
        for place, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
            for _ in range(num):
                rid = uuid.uuid4().hex if num > 1 else _rid(body.get("rid"), place if batched else None)
                requests.append(self._request(rid, np.array(prompt, np.int64), sampling, body, seen))
        return Call(tuple(requests), batched or num > 1, body, params[0].get("temperature", 1.0))

    def _request(
        self,
        rid: str,
        ids: NDArray[np.int64],
        sampling: Mapping[str, Any],
        body: Mapping[str, Any],
        seen: Counter[int],
    ) -> Request:
        limit = sampling.get("max_new_tokens", 128)
        limit = NO_LIMIT if limit is None else limit
        self._check(ids, limit, sampling)
        stream = self._content.stream(ids, 0)
        if stream.done == 0 and limit:
            stream = self._content.stream(ids, seen[stream.key])
            seen[stream.key] += 1
        natural = NO_LIMIT if sampling.get("ignore_eos") else self._content.remaining(stream)
        total = min(natural, limit, self._context_length - len(ids))
        return Request(
            rid=rid,
            ids=ids,
            stream=stream,
            total=total,
            stops=total == natural,
            cached=self._num_cached(stream.key, len(ids) - stream.done, body),
            done=self._loop.create_future(),
        )

    def _check(self, ids: NDArray[np.int64], limit: int, sampling: Mapping[str, Any]) -> None:
        room = self._context_length
        if limit < 0:
            raise Unacceptable(f"max_new_tokens must be at least 0, got {limit}.")
        if sampling.get("temperature", 1.0) < 0:
            raise Unacceptable(
                f"temperature must be a non-negative finite number, got {sampling['temperature']}."
            )
        if len(ids) >= room:
            raise Unacceptable(
                f"The input ({len(ids)} tokens) is longer than the model's context length ({room} tokens)."
            )
        if limit != NO_LIMIT and len(ids) + limit > room:
            raise Unacceptable(
                f"Requested token count exceeds the model's maximum context length of {room} tokens. You requested "
                f"a total of {len(ids) + limit} tokens: {len(ids)} tokens from the input messages and {limit} tokens "
                "for the completion. Please reduce the number of tokens in the input messages or the completion to "
                "fit within the limit."
            )
        if ids.min() < 0 or ids.max() >= self._content.facts.vocab_size:
            raise OutsideVocabulary

    def _num_cached(self, prompt: int, num_prompt: int, body: Mapping[str, Any]) -> int:
        """A prompt is cached as a whole, from its first request until the next flush."""
        start = body.get("logprob_start_len")
        known = prompt in self._cached
        self._cached.add(prompt)
        if not known:
            return 0
        bound = start if body.get("return_logprob") and start is not None and start >= 0 else num_prompt - 1
        return min(num_prompt - 1, bound)

    def answer(self, call: Call, outcomes: list[Outcome]) -> Any:
        """The answer's JSON value."""
        answers = [
            self._one(call, request, outcome)
            for request, outcome in zip(call.requests, outcomes, strict=True)
        ]
        return answers if call.is_list else answers[0]

    def _one(self, call: Call, request: Request, outcome: Outcome) -> dict[str, Any]:
        stops = outcome == "stop"
        ids = self._content.tokens(request.stream, request.sampled, stops=stops)
        spans = _label_spans(request)
        meta: dict[str, Any] = {
            "id": request.rid,
            "finish_reason": _finish_reason(outcome, ids),
            "weight_version": spans[-1]["version"],
            "weight_versions": spans,
            "completion_tokens": len(ids),
            "e2e_latency": request.times["finished"] - request.times["received"],
        }
        if call.body.get("return_logprob"):
            meta |= self._logprobs(call, request, ids)
        if outcome != "abort in queue":
            meta |= {
                "prompt_tokens": len(request.ids),
                "num_retractions": request.retractions,
                "reasoning_tokens": 0,
                "cached_tokens": request.cached,
                "cached_tokens_details": {"device": request.cached, "host": 0} if request.cached else None,
                "dp_rank": None,
            }
            if call.body.get("return_routed_experts") and self._content.facts.is_moe:
                start = call.body.get("routed_experts_start_len") or 0
                meta["routed_experts"] = self._experts(request, ids)[start:].tobytes()
                meta["routed_experts"] = base64.b64encode(meta["routed_experts"]).decode()
        text = self._content.spell(ids[:-1] if stops else ids)
        return {"text": text, "output_ids": ids.tolist(), "meta_info": meta}

    def _logprobs(self, call: Call, request: Request, ids: NDArray[np.int64]) -> dict[str, Any]:
        versions, num_prompt = _versions(request), len(request.ids)
        positions = np.arange(num_prompt, num_prompt + len(ids))
        logp = np.concatenate(
            [
                simulated_logp(ids[a:b], positions[a:b], version, call.temperature)
                for a, b, version in versions
            ]
        )
        found: dict[str, Any] = {
            "input_token_logprobs": self._scored(request, call.body.get("logprob_start_len", -1)),
            "output_token_logprobs": _rows(logp, ids),
            "output_token_logprobs_length": len(ids),
        }
        wanted = call.body.get("token_ids_logprob")
        if wanted is not None:
            place = call.requests.index(request) * len(wanted) // len(call.requests)
            candidates = np.array(wanted[place] if isinstance(wanted[0], list) else wanted, np.int64)
            found["input_token_ids_logprobs"] = []
            found["output_token_ids_logprobs"] = [
                _rows(
                    simulated_logp(candidates, np.full(len(candidates), at), version, call.temperature),
                    candidates,
                )
                for a, b, version in versions
                for at in positions[a:b]
            ]
        return found

    def _scored(self, request: Request, start: int | None) -> list[list[Any]]:
        """Log-probs of the prompt's tokens, at temperature 1 whatever is asked, the first one unknown."""
        if start is None or start < 0:
            return []
        ids = request.ids[start:]
        version = request.passes[0][1] if request.passes else request.changes[-1][2]
        logp = simulated_logp(ids, np.arange(start, start + len(ids)), version)
        # SGLang names the last id of the vocabulary 0 here.
        rows = _rows(logp, np.where(ids == self._content.facts.vocab_size - 1, 0, ids))
        rows[0][0] = None
        return rows

    def _experts(self, request: Request, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """[P + T - 1, layers, K], each row of the pass that computed it last."""
        whole = np.concatenate([request.ids, ids])[:-1]
        starts = [start for start, _ in request.passes]
        rows = [
            self._content.experts(whole[start:end], version)
            for (start, version), end in zip(request.passes, [*starts[1:], len(whole)], strict=True)
        ]
        return np.concatenate(rows)


def times_of(request: Request, outcome: Outcome, loop_time: float) -> dict[str, float]:
    """What a server with metrics adds to an answer."""
    wall = time.time() - loop_time
    if outcome == "abort in queue":
        return {"response_sent_to_client_ts": wall + loop_time}
    received, admitted, prefilled, finished = (
        request.times.get(name, request.times["received"])
        for name in ("received", "admitted", "prefilled", "finished")
    )
    return {
        "storage_prefetch_wait": 0.0,
        "storage_staging_wait": 0.0,
        "forward_entry_time": wall + admitted,
        "prefill_finished_time": wall + prefilled,
        "queue_time": admitted - received,
        "request_received_ts": wall + received,
        "first_token_latency": prefilled - received,
        "api_server_dispatch_finish_ts": wall + received,
        "request_finished_ts": wall + finished,
        "response_sent_to_client_ts": wall + loop_time,
    } | ({"decode_throughput": (request.sampled - 1) / (finished - prefilled)} if request.sampled > 1 else {})


def _rid(given: Any, place: int | None) -> str:
    if isinstance(given, list):
        return given[place or 0]
    if given is None:
        return uuid.uuid4().hex
    return given if place is None else f"{given}_{place}"


def _rows(logp: NDArray[np.float32], ids: NDArray[np.int64]) -> list[list[Any]]:
    return [[value, token, None] for value, token in zip(logp.tolist(), ids.tolist(), strict=True)]


def _finish_reason(outcome: Outcome, ids: NDArray[np.int64]) -> dict[str, Any]:
    match outcome:
        case "length":
            return {"type": "length", "length": len(ids)}
        case "stop":
            return {"type": "stop", "matched": int(ids[-1])}
        case "abort":
            return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        case "abort in queue":
            return {"type": "abort", "message": "Abort in waiting queue"}


def _pieces(request: Request) -> Iterator[tuple[int, int, str, int]]:
    """(start, end, label, version) of the output tokens, without empty pieces behind the first."""
    start = 0
    for end, label, version in request.changes:
        end = min(end, request.sampled)
        if end > start or (end == 0 and start == 0 and request.sampled == 0):
            yield start, end, label, version
            start = end


def _label_spans(request: Request) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    for start, end, label, _ in _pieces(request):
        if spans and spans[-1]["version"] == label:
            spans[-1]["end"] = end
        else:
            spans.append({"version": label, "start": start, "end": end})
    return spans


def _versions(request: Request) -> list[tuple[int, int, int]]:
    return [(start, end, version) for start, end, _, version in _pieces(request)]
