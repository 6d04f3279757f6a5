"""What is asked of one SGLang server, and how its answers are checked before anybody uses them.

Token ids go in and token ids come out: text is never tokenized again.  A response that spans a weight push has
one span per version; its *experts* before the last span are those of the re-prefill under the last version,
because SGLang keeps one row per token and a push retracts what is in flight.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from megatron_vespo.config import RolloutConfig, SamplingConfig
from megatron_vespo.rollout.model import ModelFacts, read_facts
from megatron_vespo.types import (
    Experts,
    Floats,
    Prompt,
    Response,
    RunError,
    Scored,
    TrainSequence,
    VersionSpan,
)

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
RETRY_AFTER_S = 0.5
DEATH_SHOWS_WITHIN_S = 5.0
PREFIXES_PER_REQUEST = 32
SCORING_SHARE = 4
"""One in so many of the server's places is kept for scoring, which would otherwise wait for the longest response."""


class SGLangEngine:
    """The `Engine` protocol over one SGLang server; make it and use it in one event loop."""

    def __init__(
        self,
        url: str,
        model: Path,
        rollout: RolloutConfig,
        sampling: SamplingConfig,
        death_report: Callable[[], str | None],
    ) -> None:
        """Prepare, connect to nothing.

        Args:
            url: http://host:port of the server.
            model: the Hugging Face directory that it serves.
            death_report: None while the server lives, else how it died (`Server.death_report`).
        """
        self.url = url
        self._facts = read_facts(model)
        self._record_experts = rollout.record_experts and self._facts.is_moe
        self._timeout_s = rollout.request_timeout_s
        scoring = max(1, rollout.max_running_requests // SCORING_SHARE)
        self._sampling_slots = _Slots(max(1, rollout.max_running_requests - scoring))
        self._scoring_slots = _Slots(scoring)
        self._sampling = sampling
        self._death_report = death_report
        self._session: aiohttp.ClientSession | None = None

    async def sample(self, prompt: Prompt, num: int) -> tuple[Response, ...]:
        """Sample `num` responses to one prompt at the sampling temperature, from the whole distribution.

        Raises:
            RunError: the server died, refused, answered nonsense, or missed `request_timeout_s` once it had room.
        """
        who = f"prompt '{prompt.uid}'"
        request = {
            "input_ids": prompt.token_ids.tolist(),
            "sampling_params": {
                "n": num,
                "temperature": self._sampling.temperature,
                "top_p": 1.0,
                "top_k": -1,
                "max_new_tokens": self._sampling.max_response_tokens,
                "stop_token_ids": list(self._facts.stop_token_ids),
            },
            "return_logprob": True,
            "return_routed_experts": self._record_experts,
        }
        answers = await self._generate(request, num, self._sampling_slots, who)
        return tuple(self._response(answer, prompt, f"{self.url}, {who}") for answer in answers)

    async def score(self, sequences: Sequence[TrainSequence]) -> tuple[Scored, ...]:
        """Log-probs and experts of given sequences, by a prefill under the weights served now.

        SGLang ignores the temperature for tokens that it is given.  At another temperature than 1 every response
        token therefore costs one request more, for the log-prob of that token after its prefix.

        Raises:
            RunError: as `sample`; also if the weights changed while one sequence was scored.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                scored = [tasks.create_task(self._score(sequence)) for sequence in sequences]
        except ExceptionGroup as failures:  # one reason is enough: the others were cancelled, or are the same
            raise failures.exceptions[0] from None
        return tuple(task.result() for task in scored)

    async def weight_version(self) -> int:
        """The version of the weights that the server serves."""
        info = await self._request("GET", "/model_info", None, "the served weight version")
        return _version(info.get("weight_version"), f"{self.url}/model_info")

    async def close(self) -> None:
        """Close the connections.  Safe to call twice."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _response(self, answer: Mapping[str, Any], prompt: Prompt, who: str) -> Response:
        limit = self._sampling.max_response_tokens
        return parse_response(answer, len(prompt.token_ids), limit, self._facts, self._record_experts, who)

    async def _score(self, sequence: TrainSequence) -> Scored:
        who = f"sequence '{sequence.uid}'"
        ids = sequence.token_ids.tolist()
        request = {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,  # also keeps cached prefixes out: every row is computed now
            "return_routed_experts": self._record_experts,
        }
        (answer,) = await self._generate(request, 1, self._scoring_slots, who)
        num_prompt, where = sequence.num_prompt_tokens, f"{self.url}, {who}"
        scored = parse_scored(answer, ids, num_prompt, self._facts, self._record_experts, where)
        if self._sampling.temperature == 1.0:
            return scored
        version = answer["meta_info"]["weight_version"]
        logp = await self._score_at_temperature(ids, num_prompt, version, who)
        return Scored(logp=logp, experts=scored.experts)

    async def _score_at_temperature(self, ids: list[int], num_prompt: int, version: str, who: str) -> Floats:
        """[T], each token as the one candidate of interest after its prefix."""
        where, logp = f"{self.url}, {who}", list[float]()
        for start in range(num_prompt, len(ids), PREFIXES_PER_REQUEST):
            ends = range(start, min(start + PREFIXES_PER_REQUEST, len(ids)))
            request = {
                "input_ids": [ids[:end] for end in ends],
                "sampling_params": {"max_new_tokens": 1, "temperature": self._sampling.temperature},
                "return_logprob": True,
                "token_ids_logprob": [[ids[end]] for end in ends],
            }
            for end, answer in zip(
                ends, await self._generate(request, len(ends), self._scoring_slots, who), strict=True
            ):
                meta = answer["meta_info"]
                ((value, token_id, *_),) = meta["output_token_ids_logprobs"][0]
                _check(token_id == ids[end], where, f"log-prob of token {token_id}", f"of token {ids[end]}")
                _check(
                    meta["weight_version"] == version, where, "weights changed while scoring", "one version"
                )
                logp.append(value)
        return _floats(logp, len(ids) - num_prompt, where)

    async def _generate(
        self, request: dict[str, Any], num: int, slots: _Slots, who: str
    ) -> list[dict[str, Any]]:
        """POST /generate for `num` sequences as soon as the server has room for them."""
        async with slots.hold(num):
            return await self._generate_now(request, num, who)

    async def _generate_now(self, request: dict[str, Any], num: int, who: str) -> list[dict[str, Any]]:
        """Ask until no answer was aborted, a bounded number of times."""
        aborted: list[dict[str, Any]] = []
        for _ in range(MAX_ATTEMPTS):
            answer = await self._request("POST", "/generate", request, who)
            answers = answer if isinstance(answer, list) else [answer]
            _check(len(answers) == num, f"{self.url}, {who}", f"{len(answers)} answers", f"{num}")
            reasons = [a["meta_info"]["finish_reason"] for a in answers]
            aborted = [reason for reason in reasons if reason and reason["type"] == "abort"]
            if not aborted:
                return answers
            logger.warning(
                "%s aborted %d of %d answers to %s (%s)", self.url, len(aborted), num, who, aborted[0]
            )
            await asyncio.sleep(RETRY_AFTER_S)
        raise RunError(
            f"engine {self.url}, {who} = aborted {MAX_ATTEMPTS} times ({aborted[0].get('message')}): expected a finished "
            "response; see the server's log"
        )

    async def _request(self, method: str, path: str, payload: dict[str, Any] | None, who: str) -> Any:
        """One answer as JSON, within the deadline; refusals (4xx) are final, failures (5xx) are tried again."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._attempts(method, path, payload, who)
        except TimeoutError:
            raise RunError(
                f"engine {self.url}{path} = no answer: {who} waited {self._timeout_s:.0f} s "
                f"(rollout.request_timeout_s) for it; {self._death_report() or 'the server still runs, see its log'}"
            ) from None

    async def _attempts(self, method: str, path: str, payload: dict[str, Any] | None, who: str) -> Any:
        if self._session is None:  # made here because it belongs to the running loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
            )
        failure = ""
        for _ in range(MAX_ATTEMPTS):
            try:
                async with self._session.request(method, self.url + path, json=payload) as answer:
                    if answer.status == 200:
                        return await answer.json()
                    failure = f"HTTP {answer.status}: {(await answer.text())[:500]}"
                    if answer.status < 500:
                        break
            except aiohttp.ClientError as err:
                failure = f"{type(err).__name__}: {err}"
                await self._raise_if_dead(who)
            await asyncio.sleep(RETRY_AFTER_S)
        raise RunError(f"engine {self.url}{path} = {failure}: {who} expected an answer; see the server's log")

    async def _raise_if_dead(self, who: str) -> None:
        """A lost connection is often seen before the process is gone: look for a while."""
        deadline = asyncio.get_running_loop().time() + DEATH_SHOWS_WITHIN_S
        while asyncio.get_running_loop().time() < deadline:
            if report := self._death_report():
                raise RunError(f"engine {self.url} = dead: {who} waited for it; it {report}")
            await asyncio.sleep(0.1)


class _Slots:
    """Bounds the sequences in flight, so that no deadline runs while a request waits in the server's queue."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free = asyncio.Semaphore(limit)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def hold(self, num: int) -> AsyncIterator[None]:
        """Hold `num` slots, or all where there are fewer; first come, first served."""
        held = 0
        try:
            async with self._turn:  # two waiters that each held a part would wait for one another for ever
                while held < min(num, self._limit):
                    await self._free.acquire()
                    held += 1
            yield
        finally:
            for _ in range(held):
                self._free.release()


def parse_response(
    answer: Mapping[str, Any],
    num_prompt: int,
    limit: int,
    facts: ModelFacts,
    record_experts: bool,
    who: str,
) -> Response:
    """One checked answer of /generate.

    Args:
        num_prompt: P.
        limit: most tokens that were asked for.
        record_experts: whether experts were asked for.
        who: names the engine and the prompt in errors.

    Raises:
        RunError: a field is missing or impossible.
    """
    meta = _field(answer, "meta_info", dict, who)
    ids = np.array(_field(answer, "output_ids", list, who), np.int64)
    num = len(ids)
    prompt_tokens = meta.get("prompt_tokens")
    _check(prompt_tokens == num_prompt, who, f"a prompt of {prompt_tokens} tokens", f"{num_prompt}")
    _check(
        _within(ids, facts.vocab_size), who, f"token ids {ids.tolist()}", f"some, below {facts.vocab_size}"
    )
    rows = _field(meta, "output_token_logprobs", list, who)
    _check([row[1] for row in rows] == ids.tolist(), who, f"{len(rows)} log-probs", f"one for each of {num}")
    return Response(
        token_ids=ids.astype(np.int32),
        text=_field(answer, "text", str, who),
        behavior_logp=_floats([row[0] for row in rows], num, who),
        spans=_spans(_field(meta, "weight_versions", list, who), num, who),
        experts=_experts(meta, num_prompt + num - 1, facts, who) if record_experts else None,
        finish_reason=_finish_reason(meta, ids, limit, facts, who),
    )


def parse_scored(
    answer: Mapping[str, Any],
    ids: list[int],
    num_prompt: int,
    facts: ModelFacts,
    record_experts: bool,
    who: str,
) -> Scored:
    """One checked prefill answer of /generate for given ids; arguments as in `parse_response`.

    Raises:
        RunError: a field is missing or impossible.
    """
    meta = _field(answer, "meta_info", dict, who)
    rows = _field(meta, "input_token_logprobs", list, who)
    # SGLang names the last id of the vocabulary 0 here (0.5.20 and 0.5.23); its log-prob is right.
    named = [i if i < facts.vocab_size - 1 else 0 for i in ids]
    _check(
        [row[1] for row in rows] == named,
        who,
        f"{len(rows)} scored tokens",
        f"the {len(ids)} that were given",
    )
    return Scored(
        logp=_floats([row[0] for row in rows[num_prompt:]], len(ids) - num_prompt, who),
        experts=_experts(meta, len(ids) - 1, facts, who) if record_experts else None,
    )


def _check(fine: bool, who: str, what: str, expected: str) -> None:
    if not fine:
        raise RunError(
            f"engine {who} = {what}: expected {expected}; the engine's answer cannot be used, see its log"
        )


def _field(answer: Mapping[str, Any], key: str, kind: type, who: str) -> Any:
    value = answer.get(key)
    _check(isinstance(value, kind), who, f"'{key}' {type(value).__name__}", f"a {kind.__name__}")
    return value


def _floats(values: list[float], num: int, who: str) -> Floats:
    """float32 log-probs, each finite and not above 0 by more than rounding."""
    logp = np.array(values, np.float32)
    _check(logp.shape == (num,), who, f"log-probs of shape {logp.shape}", f"({num},)")
    bad = np.flatnonzero(~(np.isfinite(logp) & (logp <= 1e-3)))
    _check(not len(bad), who, f"log-prob {logp[bad[:1]]} of token {bad[:1]}", "a finite number of at most 0")
    return logp


def _within(ids: NDArray[Any], end: int) -> bool:
    return bool(ids.size and ids.min() >= 0 and ids.max() < end)


def _version(text: Any, who: str) -> int:
    _check(
        isinstance(text, str) and text.isdecimal(),
        who,
        f"weight version {text!r}",
        "a string of a whole number",
    )
    return int(text)


def _spans(spans: list[Mapping[str, Any]], num: int, who: str) -> tuple[VersionSpan, ...]:
    parsed = [VersionSpan(version=_version(s["version"], who), start=s["start"], end=s["end"]) for s in spans]
    parsed = [span for span in parsed if span.start != span.end]
    ends = [0, *(span.end for span in parsed)]
    covered = [span.start for span in parsed] == ends[:-1] and ends == sorted(ends) and ends[-1] == num
    versions = [span.version for span in parsed]
    _check(
        covered and versions == sorted(versions), who, f"version spans {spans}", f"ascending, from 0 to {num}"
    )
    return tuple(parsed)


def _experts(meta: Mapping[str, Any], num_rows: int, facts: ModelFacts, who: str) -> Experts:
    """[N - 1, L, K] of the layers with a router; SGLang sends all layers, flat, as base64 of int32."""
    try:
        flat = np.frombuffer(base64.b64decode(_field(meta, "routed_experts", str, who), validate=True), "<i4")
    except (binascii.Error, ValueError) as err:
        raise RunError(
            f"engine {who} = routed experts that are no base64 int32 ({err}): expected them; see its log"
        ) from err
    shape = (num_rows, facts.num_layers, facts.experts_per_token)
    _check(
        flat.size == np.prod(shape), who, f"{flat.size} routed experts", f"{shape}, tokens x layers x experts"
    )
    experts = flat.reshape(shape)[:, list(facts.router_layers)]
    last = facts.num_experts - 1
    _check(_within(experts, last + 1), who, f"expert ids {experts.min()}..{experts.max()}", f"0..{last}")
    # A layer that nobody recorded comes as zeros: the same expert twice in one row.
    repeated = np.argwhere((np.diff(np.sort(experts, axis=-1)) == 0).any(-1))
    _check(
        not len(repeated),
        who,
        f"one expert twice at (token, layer) {repeated[:1].tolist()}",
        "distinct experts",
    )
    return experts.astype(np.int16)


def _finish_reason(
    meta: Mapping[str, Any], ids: NDArray[Any], limit: int, facts: ModelFacts, who: str
) -> str:
    reason = _field(meta, "finish_reason", dict, who).get("type")
    num, last = len(ids), int(ids[-1])
    if reason == "stop":
        _check(
            last in facts.stop_token_ids, who, f"stopped at token {last}", f"one of {facts.stop_token_ids}"
        )
    else:
        _check(
            reason == "length" and num == limit,
            who,
            f"finish reason {reason} after {num} tokens",
            f"length at {limit}",
        )
    return reason
