"""What an engine answered, checked on arrival before anybody uses it.

One answer of /generate is a list with one object for each sequence.  Checks are whole-array: a response has up to
16k+ tokens, and its experts tens of megabytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import index, itemgetter
from typing import Any

import numpy as np
import orjson
import pybase64
from numpy.typing import NDArray

from megatron_vespo.rollout.failures import Unusable
from megatron_vespo.rollout.model import ModelFacts
from megatron_vespo.routes import narrowest
from megatron_vespo.types import Experts, Floats, Ints, Scored, VersionSpan


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one sequence of a request asked for."""

    num_prefix: int
    """Tokens given: the prompt, and what was sampled before."""
    limit: int
    """Most tokens to sample."""
    first_row: int
    """First token whose experts are wanted."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one request added to one response; one that was interrupted may have no token."""

    token_ids: Ints
    logp: Floats
    spans: tuple[VersionSpan, ...]
    """Relative to this part."""
    experts: Experts | None
    """[first row wanted .. last token sampled), L, K]: the last token that was sampled has no row yet."""
    text: str
    finish_reason: str
    """"stop", "length", or "abort": interrupted."""
    num_retractions: int = 0


NOTHING = Part(
    token_ids=np.empty(0, np.int32),
    logp=np.empty(0, np.float32),
    spans=(),
    experts=None,
    text="",
    finish_reason="abort",
)
"""Interrupted before there was a token that could be kept."""


def parse_json(body: bytes, num: int) -> list[Mapping[str, Any]]:
    """The objects of an answer to `num` sequences.

    Raises:
        Unusable: it is no JSON, or another number of them.
    """
    try:
        answers = orjson.loads(body)
    except orjson.JSONDecodeError as err:
        raise Unusable(f"{body[:100]!r}: expected JSON ({err})") from err
    answers = answers if isinstance(answers, list) else [answers]
    _check(len(answers) == num, f"{len(answers)} answers", f"{num}")
    _check(all(isinstance(answer, dict) for answer in answers), "an answer without fields", "an object")
    return answers


def parse_parts(body: bytes, asked: Sequence[Asked], facts: ModelFacts, record_experts: bool) -> list[Part]:
    """One part for each sequence that was asked for, in order.

    Args:
        record_experts: whether experts were asked for.

    Raises:
        Unusable: a field is missing or impossible.
    """
    return [
        _part(answer, wanted, facts, record_experts)
        for answer, wanted in zip(parse_json(body, len(asked)), asked, strict=True)
    ]


def parse_scored(
    answer: Mapping[str, Any], ids: list[int], num_prompt: int, facts: ModelFacts, record_experts: bool
) -> Scored:
    """A prefill of given ids, of which the first `num_prompt` are the prompt.

    Raises:
        Unusable: a field is missing or impossible.
    """
    meta = _field(answer, "meta_info", dict)
    rows = _field(meta, "input_token_logprobs", list)
    # SGLang names the last id of the vocabulary 0 here (0.5.20 and 0.5.23); its log-prob is right.
    named = [i if i < facts.vocab_size - 1 else 0 for i in ids]
    _check(_column(rows, 1) == named, f"{len(rows)} scored tokens", f"the {len(ids)} that were given")
    return Scored(
        logp=_floats(_column(rows[num_prompt:], 0), len(ids) - num_prompt),
        experts=_experts(meta, len(ids) - 1, facts) if record_experts else None,
    )


def parse_candidate(answer: Mapping[str, Any], token_id: int) -> float:
    """Log-prob, in nats, of the one candidate that was asked about for the token after a prefix.

    Raises:
        Unusable: it is missing, of another token, or impossible.
    """
    rows = _field(_field(answer, "meta_info", dict), "output_token_ids_logprobs", list)
    try:
        ((value, named, *_),) = rows[0]
    except (IndexError, TypeError, ValueError) as err:
        raise Unusable(f"candidates {rows}: expected one, with its log-prob") from err
    _check(named == token_id, f"log-prob of token {named}", f"of token {token_id}")
    return float(_floats([value], 1)[0])


def version_of(answer: Mapping[str, Any]) -> int:
    """The weight version that an answer ends with.

    Raises:
        Unusable: it is no number.
    """
    return _version(_field(answer, "meta_info", dict).get("weight_version"))


def was_interrupted(answer: Mapping[str, Any]) -> bool:
    """Whether the engine gave the request back unfinished.

    Raises:
        Unusable: the answer has no such field.
    """
    reason = _field(answer, "meta_info", dict).get("finish_reason")
    return isinstance(reason, dict) and reason.get("type") == "abort"


def _part(answer: Mapping[str, Any], asked: Asked, facts: ModelFacts, record_experts: bool) -> Part:
    meta = _field(answer, "meta_info", dict)
    ids = _whole(_field(answer, "output_ids", list), "token ids")
    num = len(ids)
    interrupted = was_interrupted(answer)
    if interrupted and (num == 0 or _lacks_a_record(meta, record_experts)):
        return NOTHING
    prompt_tokens = meta.get("prompt_tokens")
    unsaid = interrupted and prompt_tokens is None  # of a request that waited in SGLang's queue
    _check(
        unsaid or prompt_tokens == asked.num_prefix,
        f"a prompt of {prompt_tokens} tokens",
        f"{asked.num_prefix}",
    )
    if not _within(ids, facts.vocab_size):
        raise Unusable(f"token ids {_some(ids)}: expected some, below {facts.vocab_size}")
    rows = _field(meta, "output_token_logprobs", list)
    named = _whole(_column(rows, 1), "token ids of log-probs")
    _check(np.array_equal(named, ids), f"{len(rows)} log-probs", f"one for each of {num} tokens")
    num_rows = asked.num_prefix + num - 1 - asked.first_row
    return Part(
        token_ids=ids.astype(np.int32),
        logp=_floats(_column(rows, 0), num),
        spans=_spans(_field(meta, "weight_versions", list), num),
        experts=_experts(meta, num_rows, facts) if record_experts else None,
        text=_field(answer, "text", str),
        finish_reason=_finish_reason(meta, ids, asked.limit, facts),
        num_retractions=meta.get("num_retractions") or 0,
    )


def _lacks_a_record(meta: Mapping[str, Any], record_experts: bool) -> bool:
    """SGLang says less of a request that it interrupts while it waits in its queue, where a retraction may have put it."""
    return "weight_versions" not in meta or (record_experts and meta.get("routed_experts") is None)


def _finish_reason(meta: Mapping[str, Any], ids: NDArray[Any], limit: int, facts: ModelFacts) -> str:
    reason = _field(meta, "finish_reason", dict).get("type")
    num, stops = len(ids), int(ids[-1]) in facts.stop_token_ids
    if reason == "abort":  # an interruption hides that the token sampled just then was the last one anyway
        return "stop" if stops else "length" if num == limit else "abort"
    if reason == "stop":
        _check(stops, f"stopped at token {ids[-1]}", f"one of {facts.stop_token_ids}")
    else:
        _check(
            reason == "length" and num == limit,
            f"finish reason {reason} after {num} tokens",
            f"length at {limit}",
        )
    return reason


def _check(fine: bool, what: str, expected: str) -> None:
    if not fine:
        raise Unusable(f"{what}: expected {expected}")


def _field(answer: Mapping[str, Any], key: str, kind: type) -> Any:
    value = answer.get(key)
    if not isinstance(value, kind):
        raise Unusable(f"'{key}' {type(value).__name__}: expected a {kind.__name__}")
    return value


def _column(rows: list[Any], which: int) -> list[Any]:
    try:
        return list(map(itemgetter(which), rows))
    except (TypeError, IndexError, KeyError) as err:
        raise Unusable(f"log-probs {rows[:2]}: expected (log-prob, token id, text)") from err


def _floats(values: list[Any], num: int) -> Floats:
    """float32 log-probs, each finite and not above 0 by more than rounding."""
    try:
        logp = np.array(values, np.float32)
    except (TypeError, ValueError) as err:
        raise Unusable(f"log-probs that are no numbers ({err}): expected {num}") from err
    _check(logp.shape == (num,), f"log-probs of shape {logp.shape}", f"({num},)")
    fine = np.isfinite(logp) & (logp <= 1e-3)
    if not fine.all():
        bad = np.flatnonzero(~fine)[:1]
        raise Unusable(f"log-prob {logp[bad]} of token {bad}: expected a finite number of at most 0")
    return logp


def _within(ids: NDArray[Any], end: int) -> bool:
    return bool(ids.size and ids.min() >= 0 and ids.max() < end)


def _some(ids: NDArray[Any]) -> str:
    return f"{ids[:8].tolist()}{'...' if len(ids) > 8 else ''}"


def _version(text: Any) -> int:
    _check(
        isinstance(text, str) and text.isdecimal(), f"weight version {text!r}", "a string of a whole number"
    )
    return int(text)


def _whole(values: Sequence[Any], what: str) -> NDArray[np.int64]:
    """[n]"""
    try:
        array = np.array(values)
    except ValueError as err:
        raise Unusable(f"{what} {list(values[:3])}...: expected whole numbers") from err
    fine = array.ndim == 1 and (not array.size or array.dtype.kind == "i")
    _check(fine, f"{what} {list(values[:3])}...", "whole numbers")
    return array.astype(np.int64)


def _spans(spans: list[Mapping[str, Any]], num: int) -> tuple[VersionSpan, ...]:
    try:
        parsed = [
            VersionSpan(version=_version(s["version"]), start=index(s["start"]), end=index(s["end"]))
            for s in spans
        ]
    except (KeyError, TypeError) as err:  # a field is missing, or not a whole number
        raise Unusable(f"version spans {spans}: expected version, start and end") from err
    parsed = [span for span in parsed if span.start != span.end]
    ends = [0, *(span.end for span in parsed)]
    covered = [span.start for span in parsed] == ends[:-1] and ends == sorted(ends) and ends[-1] == num
    versions = [span.version for span in parsed]
    _check(covered and versions == sorted(versions), f"version spans {spans}", f"ascending, from 0 to {num}")
    return tuple(parsed)


def _experts(meta: Mapping[str, Any], num_rows: int, facts: ModelFacts) -> Experts:
    """[num_rows, L, K] of the layers with a router; SGLang sends all layers, flat, as base64 of int32."""
    try:
        flat = np.frombuffer(pybase64.b64decode(_field(meta, "routed_experts", str), validate=True), "<i4")
    except ValueError as err:  # binascii.Error is one
        raise Unusable(f"routed experts that are no base64 int32 ({err}): expected them") from err
    shape = (num_rows, facts.num_layers, facts.experts_per_token)
    _check(flat.size == np.prod(shape), f"{flat.size} routed experts", f"{shape}, tokens x layers x experts")
    experts, last = flat.reshape(shape), facts.num_experts - 1
    if len(facts.router_layers) < facts.num_layers:
        experts = experts[:, list(facts.router_layers)]
    if num_rows and not _within(experts, last + 1):
        raise Unusable(f"expert ids {experts.min()}..{experts.max()}: expected 0..{last}")
    experts = experts.astype(narrowest(facts.num_experts))
    if not num_rows:
        return experts
    # A layer that nobody recorded comes as zeros: the same expert twice in one row.
    repeated = np.zeros(shape[:1] + experts.shape[1:2], np.bool_)
    for one, other in combinations(np.moveaxis(experts, -1, 0).copy(), 2):
        repeated |= one == other
    if repeated.any():
        where = np.argwhere(repeated)[:1].tolist()
        raise Unusable(f"one expert twice at (token, layer) {where}: expected distinct experts")
    return experts
