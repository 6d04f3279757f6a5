"""Verifiers: rules that compute rewards from a prompt's answer and a response's text."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from types import TracebackType

from megatron_vespo.config import RewardConfig
from megatron_vespo.data.judges import Failure, HttpJudge, InlineJudge, Judge, WorkerPool
from megatron_vespo.types import Prompt, Response, RunError, Verifier

log = logging.getLogger(__name__)

FATAL_IN_A_ROW = {"deaths": 16, "outages": 16}
"""So many responses that failed so, with none judged in between, failed of something else than themselves."""


def make_verifier(cfg: RewardConfig) -> TextVerifier:
    """The configured verifier, to be entered with `async with`; without the overlong penalty, which training adds."""
    workers = {"num_processes": cfg.num_processes, "timeout_s": cfg.timeout_s}
    if cfg.function is not None:
        judge: Judge = WorkerPool(("function", cfg.function), **workers)
    elif cfg.url is not None:
        judge = HttpJudge(cfg.url, num_requests=cfg.num_processes, timeout_s=cfg.timeout_s)
    elif cfg.verifier == "exact_match":
        judge = InlineJudge(exact_match)
    else:
        judge = WorkerPool(("math",), **workers)
    return TextVerifier(judge, cfg.failure_reward)


class TextVerifier:
    """Rewards responses by their text, in a judge's opinion (types.Verifier).

    A response that cannot be judged gets `failure_reward` and is counted in `failures`; none is lost.
    """

    def __init__(self, judge: Judge, failure_reward: float) -> None:
        self._failures = dict.fromkeys(judge.failure_kinds, 0)
        self.failures: Mapping[str, int] = self._failures
        self._judge = judge
        self._failure_reward = failure_reward
        self._in_a_row = 0
        self._closed = False

    async def __aenter__(self) -> TextVerifier:
        """Raises ConfigError or RunError if the judge cannot work: enter it before anything that is slow to start."""
        await self._judge.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        await self._judge.close()

    async def score(self, prompt: Prompt, responses: Sequence[Response]) -> tuple[float, ...]:
        """One reward per response; equal texts are judged once.

        Raises:
            RunError: the judge works for nobody, or this verifier was closed.
        """
        if self._closed:
            raise RunError("verifier = closed: expected an open one to score with; make a new one")
        texts = list(dict.fromkeys(response.text for response in responses))
        verdicts = await asyncio.gather(*(self._judge.judge(prompt, text) for text in texts))
        rewards = {text: self._reward(prompt, verdict) for text, verdict in zip(texts, verdicts, strict=True)}
        return tuple(rewards[response.text] for response in responses)

    def _reward(self, prompt: Prompt, verdict: float | Failure) -> float:
        fatal_after = FATAL_IN_A_ROW.get(verdict.kind) if isinstance(verdict, Failure) else None
        self._in_a_row = self._in_a_row + 1 if fatal_after else 0
        if not isinstance(verdict, Failure):
            return verdict
        self._failures[verdict.kind] += 1
        first = self._failures[verdict.kind] == 1
        log.log(
            logging.WARNING if first else logging.INFO,
            "prompt '%s': a response could not be judged and is worth %g (%s so far: %d)%s",
            prompt.uid,
            self._failure_reward,
            verdict.kind,
            self._failures[verdict.kind],
            f": {verdict.detail}" if first else "",
        )
        if fatal_after and self._in_a_row >= fatal_after:
            raise RunError(
                f"verifier {verdict.kind} = {self._in_a_row} in a row: expected some response to be judged, last "
                f"{verdict.detail}; mend the reward, and look for the out-of-memory killer"
            )
        return self._failure_reward


def punish_overlong(verifier: Verifier, cfg: RewardConfig, max_response_tokens: int) -> Verifier:
    """The same verifier with DAPO's soft overlong punishment, where that is configured.

    Evaluation uses the verifier without it, which is the same one, with the same workers.
    """
    return OverlongPenalty(verifier, cfg, max_response_tokens) if cfg.overlong_tokens else verifier


class OverlongPenalty:
    """Takes `overlong_penalty * min(1, max(0, T - (max_response_tokens - overlong_tokens)) / overlong_tokens)` off a reward.

    T counts all tokens of the response, an environment's included, because the limit counts them (DAPO, equation 13).
    """

    def __init__(self, verifier: Verifier, cfg: RewardConfig, max_response_tokens: int) -> None:
        self.failures = verifier.failures
        self._verifier = verifier
        self._first = max_response_tokens - cfg.overlong_tokens
        self._tokens = cfg.overlong_tokens
        self._penalty = cfg.overlong_penalty

    async def score(self, prompt: Prompt, responses: Sequence[Response]) -> tuple[float, ...]:
        """One reward per response, after the punishment."""
        rewards = await self._verifier.score(prompt, responses)
        return tuple(
            reward - self._penalty * min(1.0, max(0, len(response.token_ids) - self._first) / self._tokens)
            for reward, response in zip(rewards, responses, strict=True)
        )


def exact_match(text: str, answer: str) -> float:
    r"""1 if what stands in the last \boxed{} of the text, or else the whole text, is the answer; spaces around it aside."""
    return float(_last_boxed(text).strip() == answer.strip())


def _last_boxed(text: str) -> str:
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1
    for end, character in enumerate(rest if box else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:end]
    return text
