"""Memory and time of the chunked LM head against versions with the logits of all tokens, as one table.

    python benchmarks/logprobs.py [--tokens 2048 3072] [--vocab 151936] [--hidden 2048] [--dtype float32] [--device cpu]

Log-probs and entropies; "train" is forward and backward, "score" the forward without gradient. Memory is measured at
--tokens, time at --time-tokens.

    chunked    megatron_vespo.trainer.logprobs
    full       logits, log_softmax, gather, entropy under no_grad, and autograd
    in place   one buffer of all logits, which becomes the softmax and then its own gradient; entropy by rows

All three have float32 logits of the same accuracy; but on CUDA a bfloat16 product of the other two is rounded to
bfloat16 first, as is usual and fastest. Peak memory is that beyond the inputs, gradients included, each of its own fresh
process (CPU: peak resident set; CUDA: the allocator's peak). Times are medians of repetitions that take turns, in one
process; "cpu" is processor time, which other jobs on the machine disturb less. At --extrapolate tokens the chunked
version is measured, and the memory of the other two is a straight line through their two largest sizes (of some
thousand tokens: of fewer, the gradient of the head is larger than the logits and hides them).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vespo.trainer.logprobs import Head, token_stats

Version = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


class OneRank:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def chunked(hidden_Sh: Tensor, weight: Tensor, label: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    group: Any = OneRank()
    head = Head(group=group, sequence_parallel=False, temperature=1.0, chunk_tokens=chunk)
    at = torch.arange(len(label), device=label.device)
    stats = token_stats(hidden_Sh[:, None], weight, at, label, head)
    return stats.logp, stats.entropy


def full(hidden_Sh: Tensor, weight: Tensor, label: Tensor, _: int) -> tuple[Tensor, Tensor]:
    everything = torch.log_softmax(all_logits(hidden_Sh, weight), -1)
    with torch.no_grad():
        entropy = -everything.exp().mul_(everything).sum(-1)
    return everything.gather(1, label[:, None])[:, 0], entropy


def in_place(hidden_Sh: Tensor, weight: Tensor, label: Tensor, _: int) -> tuple[Tensor, Tensor]:
    return InPlace.apply(hidden_Sh, weight, label)  # type: ignore[no-any-return]


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        z = all_logits(hidden, weight)
        logp, entropy = z.new_empty(len(z)), z.new_empty(len(z))
        for rows in torch.arange(len(z), device=z.device).split(256):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            x = z[part].sub_(z[part].amax(-1, keepdim=True))
            e = x.exp()
            total = e.sum(-1)
            logp[part] = x.gather(1, label[part, None])[:, 0] - total.log()
            entropy[part] = total.log() - x.mul_(e).sum(-1) / total
            torch.div(e, total[:, None], out=x)
        ctx.save_for_backward(hidden, weight, label, z)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, label, p = ctx.saved_tensors
        grad_z = p.mul_(-grads[0][:, None]).scatter_add_(1, label[:, None], grads[0][:, None])
        grad_z = grad_z.to(weight.dtype)
        return grad_z @ weight, grad_z.T @ hidden, None


VERSIONS: dict[str, Version] = {"chunked": chunked, "full": full, "in place": in_place}


def all_logits(hidden_Sh: Tensor, weight: Tensor) -> Tensor:
    if hidden_Sh.is_cuda:
        return (hidden_Sh @ weight.T).float()
    return hidden_Sh.float() @ weight.float().T


# ------------------------------------------------------------------------------------------- one fresh process


class Bench:
    """The inputs, and one call of a version."""

    def __init__(self, args: argparse.Namespace, tokens: int) -> None:
        torch.manual_seed(0)
        place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
        self.hidden = torch.randn(tokens, args.hidden, **place).requires_grad_()
        self.weight = torch.randn(args.vocab, args.hidden, **place).mul_(0.05).requires_grad_()
        self.label = torch.randint(0, args.vocab, (tokens,), device=args.device)
        self.upstream = torch.randn(tokens, device=args.device)
        self.upstream[: int(args.zero_fraction * tokens)] = 0.0
        self.chunk, self.device = args.chunk, args.device

    def call(self, version: str, case: str) -> None:
        self.hidden.grad = self.weight.grad = None
        with torch.set_grad_enabled(case == "train"):
            logp, _ = VERSIONS[version](self.hidden, self.weight, self.label, self.chunk)
            if case == "train":
                logp.backward(self.upstream)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def extra_bytes(self, version: str, case: str) -> int:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.call(version, case)
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident_bytes("VmRSS")
        self.call(version, case)
        return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure_memory(args: argparse.Namespace, tokens: int, version: str, case: str) -> int:
    bench = Bench(args, 64)  # libraries make their own buffers at first use
    bench.call(version, case)
    del bench
    return Bench(args, tokens).extra_bytes(version, case)


def measure_time(args: argparse.Namespace, tokens: int, versions: list[str], case: str) -> dict[str, list]:
    """By version: (wall, cpu) seconds of each repetition."""
    bench, seconds = Bench(args, tokens), {version: [] for version in versions}
    for repetition, version in itertools.product(range(-1, args.repeats), versions):
        wall, cpu = time.perf_counter(), time.process_time()
        bench.call(version, case)
        if repetition >= 0:
            seconds[version].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def in_fresh_process(args: argparse.Namespace, *task: Any) -> Any:
    """Result of `measure_memory` or `measure_time`, whichever `task` names, with the rest as its arguments."""
    request = json.dumps([vars(args), *task])
    command = [sys.executable, __file__, "--request", request]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def serve(request: str) -> None:
    settings, task, *rest = json.loads(request)
    json.dump(globals()[task](argparse.Namespace(**settings), *rest), sys.stdout)


# --------------------------------------------------------------------------------------------------- the table


def require_memory(args: argparse.Namespace, versions: list[str]) -> None:
    """Largest allocation that will be asked for, against what the machine has free (CPU only)."""
    copies = {"chunked": 0.2, "in place": 1.1, "full": 3.0}
    tokens = max(args.tokens + args.time_tokens)
    logits = tokens * args.vocab * 4
    need = int(max(copies[v] for v in versions) * logits + 4 * args.vocab * args.hidden * 4)
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    if args.device == "cpu" and need > min(free, args.max_gb * 1e9):
        raise SystemExit(
            f"tokens = {tokens}, about {need / 1e9:.0f} GB for {', '.join(versions)}: must be below --max-gb "
            f"{args.max_gb:g} and the {free / 1e9:.0f} GB that are free; use fewer tokens, or fewer --versions"
        )


def memory_rows(args: argparse.Namespace, case: str) -> list[str]:
    sizes = sorted({*args.tokens, args.extrapolate})
    extra = {version: extra_bytes(args, sizes, version, case) for version in args.versions}
    first = extra[args.versions[0]]
    return [
        f"{case:6s} {n:7d} {version:9s} {extra[version][n] / 1e9:8.2f} GB {extra[version][n] / first[n]:7.2f} x"
        + ("" if is_measured(args, n, version) else "  (extrapolated)")
        for n in sizes
        for version in args.versions
    ]


def extra_bytes(args: argparse.Namespace, sizes: list[int], version: str, case: str) -> dict[int, float]:
    extra: dict[int, float] = {
        n: in_fresh_process(args, "measure_memory", n, version, case)
        for n in sizes
        if is_measured(args, n, version)
    }
    for n in set(sizes) - set(extra):
        a, b = args.tokens[-2:]
        extra[n] = extra[b] + (n - b) / (b - a) * (extra[b] - extra[a])
    return extra


def is_measured(args: argparse.Namespace, tokens: int, version: str) -> bool:
    """The chunked version fits everywhere, and its memory is no straight line: a tile grows no further."""
    return tokens in args.tokens or len(args.tokens) < 2 or version == "chunked"


def time_rows(args: argparse.Namespace, case: str) -> list[str]:
    rows = []
    for tokens in args.time_tokens:
        seconds = in_fresh_process(args, "measure_time", tokens, args.versions, case)
        base = seconds[args.versions[0]]
        for version in args.versions:
            wall, cpu = (statistics.median(x[i] for x in seconds[version]) for i in (0, 1))
            ratios = [
                statistics.median(x[i] / b[i] for x, b in zip(seconds[version], base, strict=True))
                for i in (0, 1)
            ]
            rows.append(
                f"{case:6s} {tokens:7d} {version:9s} {wall:9.3f} s wall {cpu:9.3f} s cpu   "
                f"{ratios[0]:5.2f} x wall {ratios[1]:5.2f} x cpu"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 3072])
    parser.add_argument("--time-tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--chunk", type=int, default=256, help="trainer.logprob_chunk_tokens")
    parser.add_argument("--versions", nargs="+", choices=list(VERSIONS), default=list(VERSIONS))
    parser.add_argument("--cases", nargs="+", choices=["train", "score"], default=["train", "score"])
    parser.add_argument("--zero-fraction", type=float, default=0.0, help="tokens with upstream gradient 0")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", choices=["memory", "time"])
    parser.add_argument("--extrapolate", type=int, default=16384)
    parser.add_argument("--max-gb", type=float, default=12.0, help="refuse to use more on CPU")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.request:
        return serve(args.request)
    args.tokens.sort()
    require_memory(args, args.versions)
    where = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    sys.stdout.write(
        f"V = {args.vocab}, h = {args.hidden}, {args.dtype}, chunk {args.chunk}, {args.zero_fraction:.0%} of tokens "
        f"without gradient, {where}; ratios to {args.versions[0]}\n"
    )
    for case in args.cases:
        if args.skip != "memory":
            sys.stdout.write("\n".join(memory_rows(args, case)) + "\n")
            sys.stdout.flush()
        if args.skip != "time":
            sys.stdout.write("\n".join(time_rows(args, case)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
