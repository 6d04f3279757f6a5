"""A stand-in, not torchvision: the names that SGLang and transformers import at module level, and no operators.

Published torchvision wheels fail to import beside a CPU build of torch, and a text-only server never calls them.
Only the CPU server's processes see this folder.  Every name that is not listed raises, and so does every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

__version__ = "0.0.0"


def refuse(name: str) -> NoReturn:
    raise AttributeError(
        f"{name}: torchvision is not installed, this is megatron_vespo's stand-in for text-only SGLang on CPU; "
        "serve image models with rollout.device = 'cuda'"
    )


def refused(name: str) -> Callable[..., NoReturn]:
    """A function that can be imported and not called."""
    return lambda *args, **kwargs: refuse(name)


def __getattr__(name: str) -> NoReturn:
    refuse(f"{__name__}.{name}")
