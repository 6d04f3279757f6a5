"""What SGLang and transformers name at module level; see the package's docstring."""

import enum
from typing import NoReturn

from torchvision import refuse


class InterpolationMode(enum.Enum):
    """Names of interpolation methods; the stand-in interpolates nothing."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def __getattr__(name: str) -> NoReturn:
    refuse(f"{__name__}.{name}")
