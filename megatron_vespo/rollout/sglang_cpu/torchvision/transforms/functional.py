"""What SGLang and transformers name at module level; see the package's docstring."""

from typing import NoReturn

from torchvision import refuse, refused
from torchvision.transforms import InterpolationMode

__all__ = ["InterpolationMode", "pil_to_tensor"]

pil_to_tensor = refused("torchvision.transforms.functional.pil_to_tensor")


def __getattr__(name: str) -> NoReturn:
    refuse(f"{__name__}.{name}")
