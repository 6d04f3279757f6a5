"""What transformers names at module level; see the package's docstring."""

from typing import NoReturn

from torchvision import refuse, refused

decode_image = refused("torchvision.io.decode_image")
decode_jpeg = refused("torchvision.io.decode_jpeg")


class ImageReadMode:
    """Reading modes of images; the stand-in reads none."""


def __getattr__(name: str) -> NoReturn:
    refuse(f"{__name__}.{name}")
