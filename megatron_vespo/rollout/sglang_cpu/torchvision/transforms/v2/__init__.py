"""What transformers names at module level; see the package's docstring."""

from typing import NoReturn

from torchvision import refuse


def __getattr__(name: str) -> NoReturn:
    refuse(f"{__name__}.{name}")
