"""The folder that only the CPU server sees."""

from __future__ import annotations

import os
import subprocess
import sys

from megatron_vespo.rollout.server import CPU_PLATFORM


def run(code):
    env = {**os.environ, "PYTHONPATH": str(CPU_PLATFORM)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def test_the_torchvision_stand_in_has_the_names_that_are_imported_and_no_operator():
    code = """
import torchvision.transforms as T
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2 import functional as v2
assert T.InterpolationMode.BICUBIC.value == "bicubic"
for call in (lambda: pil_to_tensor(0), lambda: decode_image(b""), lambda: T.Compose, lambda: v2.resize, lambda: functional.resize):
    try:
        call()
    except AttributeError as err:
        assert "stand-in" in str(err), err
    else:
        raise AssertionError(call)
try:
    from torchvision.models import resnet18
except ModuleNotFoundError:
    print("fine")
"""
    done = run(code)
    assert done.stdout == "fine\n", done.stderr


def test_sglang_finds_the_platform_by_its_entry_points():
    code = """
from importlib.metadata import entry_points
print(*(point.value for group in ("sglang.srt.platforms", "sglang.srt.plugins")
        for point in entry_points(group=group, name="plain_cpu")))
"""
    assert run(code).stdout.split() == ["sglang_plain_cpu:activate", "sglang_plain_cpu:register_hooks"]


def test_our_own_process_does_not_see_the_stand_in():
    assert str(CPU_PLATFORM) not in sys.path
