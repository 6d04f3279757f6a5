"""Seconds and peak memory of the phases of a step, as this rank sees them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


class Phases:
    """`with phases("optimizer"): ...`; a phase that comes again adds its seconds and keeps its larger peak.

    Memory is the peak of what torch allocated on a CUDA device; on CPU, where the system keeps no peak by phase, the
    resident size of the process at the phase's end.
    """

    def __init__(self, device: torch.device) -> None:
        self.time_s: dict[str, float] = {}
        self.memory_bytes: dict[str, int] = {}
        self._device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        began = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize(self._device)
        self.time_s[name] = self.time_s.get(name, 0.0) + time.perf_counter() - began
        used = torch.cuda.max_memory_allocated(self._device) if on_gpu else psutil.Process().memory_info().rss
        self.memory_bytes[name] = max(used, self.memory_bytes.get(name, 0))
