"""One process that judges responses; `judges.WorkerPool` starts it, talks to it and kills it.

On stdin: one JSON triple a line, [prompt text, response text, answer].  On stdout: first {"ready": true}, or
{"refused": why}; then one line for each request, a number (the reward) or {"error": traceback}.
Usage: judge_worker.py PARENT_PID math | judge_worker.py PARENT_PID function TARGET
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import inspect
import json
import logging
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TextIO

Judge = Callable[[str, str, str], float]

MAX_ADDRESS_SPACE_BYTES = 4 * 1024**3
"""10^10^10 must not take the machine's memory before its deadline."""
MAX_TRACEBACK_CHARACTERS = 4000
PR_SET_PDEATHSIG = 1


def math_judge() -> Judge:
    """1 if the answer that the response gives is mathematically equal to the prompt's, else 0."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # What stands in a box is the answer, whatever "the answer is" precedes it.
    latex = LatexExtractionConfig(boxed_match_priority=0)
    # math-verify's own deadlines are off: its alarm signals cannot interrupt C code, our parent's kill can.
    find = functools.partial(parse, parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    @functools.lru_cache(maxsize=1024)
    def gold(answer: str) -> list[Any]:
        # Answer columns hold bare LaTeX, which math-verify recognises only inside an environment.
        return find(f"\\boxed{{{answer}}}", extraction_config=(latex,))

    def judge(prompt: str, response: str, answer: str) -> float:
        found = find(response, extraction_config=(latex, ExprExtractionConfig()))
        return float(verify(gold(answer), found, timeout_seconds=None))

    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE_BYTES, MAX_ADDRESS_SPACE_BYTES))
    logging.disable(logging.CRITICAL)
    judge("", "\\boxed{1}", "1")  # builds the regular expressions and the LaTeX parser
    return judge


def function_judge(target: str) -> Judge:
    """What a user's function says, sync or async, of (prompt, response, answer)."""
    from megatron_vespo.config import ConfigError
    from megatron_vespo.data.named import load_named

    function = load_named(target, "reward.function")
    try:
        inspect.signature(function).bind("prompt", "response", "answer")
    except TypeError as err:
        raise ConfigError(
            f"reward.function = '{target}': expected a function of (prompt, response, answer), but {err}; change it"
        ) from None
    except ValueError:
        pass  # a function written in C does not tell
    runner = asyncio.Runner()  # one loop for all calls, so that the function may keep connections

    def judge(prompt: str, response: str, answer: str) -> float:
        result = function(prompt, response, answer)
        if inspect.isawaitable(result):
            result = runner.run(_awaited(result))
        if isinstance(result, str | bytes) or not math.isfinite(reward := float(result)):
            raise ValueError(f"the reward is {result!r}, expected a finite number")
        return reward

    return judge


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


def _private_channel() -> tuple[TextIO, TextIO]:
    """Requests and replies, out of reach of whatever reads stdin, prints, or starts processes here."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 0)
    os.dup2(2, 1)
    return requests, replies


def _main(parent: str, kind: str, *arguments: str) -> None:
    _die_with_parent(int(parent))
    requests, replies = _private_channel()
    try:
        judge = {"math": math_judge, "function": function_judge}[kind](*arguments)
    except ValueError as err:  # a ConfigError
        replies.write(json.dumps({"refused": str(err)}) + "\n")
        return
    silence = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # until here it went to whoever reports why a worker does not start
        os.dup2(silence, output)
    replies.write('{"ready": true}\n')
    for line in requests:
        try:
            reply: Any = judge(*json.loads(line))
        except Exception:  # noqa: BLE001  # the process boundary: the parent is told
            reply = {"error": traceback.format_exc()[-MAX_TRACEBACK_CHARACTERS:]}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
