"""Failures that one rank meets alone and all ranks must stop for, or the others wait for it in the next collective."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist


@contextlib.contextmanager
def together(kind: type[Exception], foreign: type[Exception], what: str, advice: str) -> Iterator[None]:
    """Collective: what goes wrong inside on any rank is raised on every rank, in the words of the first that failed.

    Args:
        kind: raised everywhere; raised inside, it speaks for itself.
        foreign: any other exception that is met here, told as `what (the exception); advice`.  The rest passes through:
            after a failed collective, for one, no other can be trusted to end.
    """
    problem: str | None = None
    try:
        yield
    except kind as err:
        problem = str(err)
    except foreign as err:
        problem = f"{what} ({type(err).__name__}: {err}); {advice}"
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if first := next((p for p in problems if p is not None), None):
        raise kind(first)
