"""Responses of several turns: an engine and an environment answer each other, token ids in, token ids out.

The result is one Response like any other.  What the environment wrote stands in it unsampled: it is read, and not
trained on.  Sampled tokens keep the ids, log-probs, versions and experts of the pass that sampled them.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_vespo.types import (
    Engine,
    Environment,
    Experts,
    Ints,
    Mask,
    Prompt,
    Response,
    RunError,
    Sampling,
    Scored,
    TrainSequence,
    VersionSpan,
)

log = logging.getLogger(__name__)

REPLY_TIMEOUT_S = 60.0
MAX_FAILURES_IN_A_ROW = 16
"""An environment that fails so often, with no reply in between, fails everybody."""


class Conversations:
    """An engine whose responses are conversations with an environment (types.Engine).

    A conversation ends when the environment says so, after `max_turns` turns of the assistant (both keep the turn's own
    finish reason), or when the token limit of its sampling, which counts the environment's tokens too, leaves
    no room for a reply and one more sampled token ("length").  It also ends, after the turn, if the environment
    raises, returns no token ids or takes longer than `reply_timeout_s`: that is counted in `failures`.
    """

    def __init__(
        self,
        engine: Engine,
        environment: Environment,
        *,
        max_turns: int,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
    ) -> None:
        self._failures = {"timeouts": 0, "errors": 0}
        self.failures: Mapping[str, int] = self._failures
        """Replies so far that did not come, each of which ended a conversation."""
        self._engine = engine
        self._environment = environment
        self._max_turns = max_turns
        self._reply_timeout_s = reply_timeout_s
        self._failures_in_a_row = 0

    async def sample(self, prompt: Prompt, num: int, sampling: Sampling) -> tuple[Response, ...]:
        """Hold `num` conversations that begin with one prompt, none waiting for another.

        Raises:
            RunError: the engine cannot sample, or the environment replies to nobody.
        """
        talks = [asyncio.ensure_future(self._converse(prompt, sampling)) for _ in range(num)]
        try:
            return tuple(await asyncio.gather(*talks))
        finally:  # the first failure ends the others
            for talk in talks:
                talk.cancel()
            await asyncio.gather(*talks, return_exceptions=True)

    async def score(self, sequences: Sequence[TrainSequence]) -> tuple[Scored | None, ...]:
        """What the engine says: scoring knows no turns."""
        return await self._engine.score(sequences)

    async def _converse(self, prompt: Prompt, sampling: Sampling) -> Response:
        (response,) = await self._engine.sample(prompt, 1, sampling)
        while response.finish_reason == "stop" and response.num_turns < self._max_turns:
            reply = await self._reply(prompt, response)
            if reply is None:
                break
            left = sampling.max_tokens - len(response.token_ids) - len(reply)
            if left < 1:
                return replace(response, finish_reason="length")
            context = np.concatenate([prompt.token_ids, response.token_ids, reply])
            (turn,) = await self._engine.sample(
                replace(prompt, token_ids=context), 1, replace(sampling, max_tokens=left)
            )
            response = append_turn(response, reply, turn)
        return response

    async def _reply(self, prompt: Prompt, response: Response) -> Ints | None:
        """The environment's tokens; None if it ends the conversation, or fails."""
        try:
            async with asyncio.timeout(self._reply_timeout_s):
                reply = _checked(await self._environment.reply(prompt, response))
        except TimeoutError:
            self._count("timeouts", prompt, f"no reply in time (the deadline is {self._reply_timeout_s:g} s)")
        except Exception:  # noqa: BLE001  # the environment is a stranger; what it raises is counted, and told
            self._count("errors", prompt, traceback.format_exc())
        else:
            self._failures_in_a_row = 0
            return reply
        return None

    def _count(self, kind: str, prompt: Prompt, detail: str) -> None:
        self._failures[kind] += 1
        self._failures_in_a_row += 1
        name = type(self._environment).__name__
        first = self._failures[kind] == 1
        log.log(
            logging.WARNING if first else logging.INFO,
            "prompt '%s': the environment %s failed, the conversation ends (%s so far: %d)%s",
            prompt.uid,
            name,
            kind,
            self._failures[kind],
            f": {detail}" if first else "",
        )
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            raise RunError(
                f"environment {name} = {self._failures_in_a_row} failures in a row: expected some reply, last {detail}; mend it"
            )


def append_turn(response: Response, reply: Ints, turn: Response) -> Response:
    """The conversation so far, the environment's reply to it, and the next turn, as one response.

    The environment's tokens have log-prob 0 and the version of the turn before them.  Each token keeps the experts of
    the pass that read it first: the next turn's pass adds the rows from the last sampled token on.

    Args:
        turn: sampled after a prompt that ends with `response` and `reply`; its experts are those of the whole context.
    """
    before, start = len(response.token_ids), len(response.token_ids) + len(reply)
    return Response(
        token_ids=np.concatenate([response.token_ids, reply, turn.token_ids]),
        text=turn.text,
        behavior_logp=np.concatenate(
            [response.behavior_logp, np.zeros(len(reply), np.float32), turn.behavior_logp]
        ),
        spans=_joined(response.spans, turn.spans, start),
        experts=_first_pass(response.experts, turn.experts),
        finish_reason=turn.finish_reason,
        sampled=np.concatenate([_sampled(response), np.zeros(start - before, np.bool_), _sampled(turn)]),
        num_turns=response.num_turns + turn.num_turns,
        num_resumed=response.num_resumed + turn.num_resumed,
        engine=turn.engine,
    )


def _joined(
    first: tuple[VersionSpan, ...], second: tuple[VersionSpan, ...], start: int
) -> tuple[VersionSpan, ...]:
    """Spans of which the second begin at `start`: the last of the first is stretched until there."""
    spans = [*first[:-1], replace(first[-1], end=start)]
    for span in second:
        if span.version == spans[-1].version:
            spans[-1] = replace(spans[-1], end=start + span.end)
        else:
            spans.append(VersionSpan(version=span.version, start=start + span.start, end=start + span.end))
    return tuple(spans)


def _first_pass(first: Experts | None, second: Experts | None) -> Experts | None:
    if first is None or second is None:
        return None
    return np.concatenate([first, second[len(first) :]])


def _sampled(response: Response) -> Mask:
    return np.ones(len(response.token_ids), np.bool_) if response.sampled is None else response.sampled


def _checked(reply: Ints | None) -> Ints | None:
    if reply is None:
        return None
    ids = np.asarray(reply)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0:
        raise TypeError(f"the reply is {reply!r}, expected token ids")
    return ids.astype(np.int32)
