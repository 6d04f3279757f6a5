"""Size and speed of recorded expert choices, form by form, on one core.

    python benchmarks/routes.py            # 16,384 tokens x 48 layers x 8 of 128 experts, as in Qwen3-30B-A3B

Realistic routes: experts of uneven popularity, drawn anew for each token and layer; uniform ones are the worst case for a
compressor.  MB/s are of the int32 that an engine would send.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pybase64

from megatron_vespo import routes

LAYERS, TOPK, EXPERTS = 48, 8, 128


def draw(num_rows: int, spread: float) -> np.ndarray:
    """[rows, L, K] int32: the largest of popularity plus noise; spread 0 is uniform."""
    rng = np.random.default_rng(0)
    popularity = spread * rng.normal(size=(LAYERS, EXPERTS)).astype(np.float32)
    drawn = np.empty((num_rows, LAYERS, TOPK), np.int32)
    for row in range(0, num_rows, 512):
        noise = rng.gumbel(size=(min(512, num_rows - row), LAYERS, EXPERTS)).astype(np.float32)
        drawn[row : row + 512] = np.argpartition(-(popularity + noise), TOPK, axis=-1)[..., :TOPK]
    return drawn


def forms(experts: np.ndarray) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Of each form, how it is written and how it is read."""
    zstd, shape = pa.Codec("zstd", compression_level=1), experts.shape
    narrow = experts.astype(np.uint8)

    def from_base64(text: bytes) -> np.ndarray:
        return routes.narrow(routes.from_base64(text.decode(), LAYERS, TOPK), EXPERTS)

    return {
        "base64 of int32 (SGLang)": (lambda: pybase64.b64encode(experts.tobytes()), from_base64),
        "uint8": (
            lambda: experts.astype(np.uint8).tobytes(),
            lambda b: np.frombuffer(b, np.uint8).reshape(shape),
        ),
        "uint8, zstd": (
            lambda: zstd.compress(narrow.tobytes(), asbytes=True),
            lambda b: np.frombuffer(zstd.decompress(b, narrow.size), np.uint8).reshape(shape),
        ),
        "routes.py, ordered": (lambda: routes.encode(experts, EXPERTS, ordered=True), routes.decode),
        "routes.py, sets": (lambda: routes.encode(experts, EXPERTS), routes.decode),
    }


def best_of(call: Callable[[], Any], times: int = 5) -> tuple[float, Any]:
    seconds, result = [], None
    for _ in range(times):
        began = perf_counter()
        result = call()
        seconds.append(perf_counter() - began)
    return min(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16_384)
    rows = parser.parse_args().rows
    for kind, spread in (("realistic", 1.0), ("uniform", 0.0)):
        experts = draw(rows, spread)
        megabytes = experts.nbytes / 1e6
        sys.stdout.write(f"\n{kind}: {rows} x {LAYERS} x {TOPK} of {EXPERTS}, {megabytes:.1f} MB as int32\n")
        sys.stdout.write(f"{'':26}{'MB':>8}{'smaller than base64':>21}{'write MB/s':>12}{'read MB/s':>11}\n")
        largest = 0
        for name, (write, read) in forms(experts).items():
            written_s, blob = best_of(write)
            read_s, decoded = best_of(lambda read=read, blob=blob: read(blob))
            same = np.sort(decoded, -1) == np.sort(experts, -1)
            if not same.all():
                raise AssertionError(f"{name}: reads other experts than were written")
            largest = largest or len(blob)
            sys.stdout.write(
                f"{name:26}{len(blob) / 1e6:8.2f}{largest / len(blob):20.1f}x{megabytes / written_s:12.0f}{megabytes / read_s:11.0f}\n"
            )


if __name__ == "__main__":
    main()
