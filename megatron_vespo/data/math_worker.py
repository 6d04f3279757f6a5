"""One process that compares answers; `verifiers.MathVerifier` starts it, talks to it and kills it.

It imports nothing of this package, so that it starts quickly.  Every line on stdin is a JSON pair
[answer, response text]; every line on stdout is "1" (equal), "0" (not equal) or, once, "ready".
Usage: math_worker.py PARENT_PID
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MAX_ADDRESS_SPACE_BYTES = 4 * 1024**3
"""10^10^10 must not take the machine's memory before its deadline."""
PR_SET_PDEATHSIG = 1
# What stands in a box is the answer, whatever "the answer is" precedes it.
LATEX = LatexExtractionConfig(boxed_match_priority=0)


def equal(answer: str, text: str) -> bool:
    """Whether the answer that the text gives is mathematically equal to `answer`."""
    # math-verify's own deadlines are off: its alarm signals cannot interrupt C code, our parent's kill can.
    found = parse(text, extraction_config=(LATEX, ExprExtractionConfig()), parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return verify(_gold(answer), found, timeout_seconds=None)


@functools.lru_cache(maxsize=1024)
def _gold(answer: str) -> list[Any]:
    # Answer columns hold bare LaTeX, which math-verify recognises only inside an environment.
    return parse(f"\\boxed{{{answer}}}", extraction_config=(LATEX,), parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


def _main() -> None:
    _die_with_parent(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE_BYTES, MAX_ADDRESS_SPACE_BYTES))
    logging.disable(logging.CRITICAL)
    equal("1", "\\boxed{1}")  # builds the regular expressions and the LaTeX parser
    with os.fdopen(os.dup(1), "w", buffering=1) as replies:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)  # the LaTeX parser prints what it thinks of garbage
        os.dup2(silence, 2)
        replies.write("ready\n")
        for line in sys.stdin:
            answer, text = json.loads(line)
            replies.write("1\n" if equal(answer, text) else "0\n")


if __name__ == "__main__":
    _main()
