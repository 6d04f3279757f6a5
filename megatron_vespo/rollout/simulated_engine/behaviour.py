"""How a simulated engine behaves: its speed, its limits, and how long its responses are."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from statistics import NormalDist

from megatron_vespo.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """Every field is an option of the command line; times pass `speedup` times as fast as stated here."""

    weight_version: str = "0"
    seed: int = 0
    """Other responses, of other lengths."""
    lengths: str = "lognormal:200:0.8:4096"
    """Of whole responses, tokens: fixed:N, uniform:LOW:HIGH (both included), or lognormal:MEDIAN:SIGMA:CAP."""
    max_running_requests: int = 256
    context_length: int = 0
    """Tokens; 0: the model's."""
    max_total_tokens: int = 0
    """Tokens of the key-value cache, whose overflow retracts requests; 0: as many as can ever be needed."""
    decode_tokens_s: float = 100.0
    """Of a request that runs alone."""
    max_decode_tokens_s: float = 6000.0
    """Of all requests together, which very many of them reach."""
    prefill_tokens_s: float = 20000.0
    speedup: float = 1.0
    start_delay_s: float = 0.0
    """Before the port opens, as long as a real server loads; not sped up."""
    metrics: bool = True
    """As --enable-metrics: /metrics exists, and answers carry their times."""
    text: bool = True
    """Spell the tokens; else every text is empty, which costs nothing."""
    faults: list[str] = field(default_factory=list)
    """JSON objects as POST /simulate takes them (see faults.py)."""

    @property
    def step_s(self) -> tuple[float, float]:
        """A decode step takes the first number of seconds, and the second for each request; not sped up."""
        each = 1 / self.max_decode_tokens_s
        return 1 / self.decode_tokens_s - each, each

    def throughput(self, num_requests: int) -> float:
        """Tokens per second of so many requests that decode together; not sped up."""
        base, each = self.step_s
        return num_requests / (base + each * num_requests)

    def argv(self) -> list[str]:
        """The options that make a process behave so."""
        words: list[str] = []
        for name, value in vars(self).items():
            option = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words.append(option if value else option.replace("--", "--no-"))
            else:
                for item in value if isinstance(value, list) else [value]:
                    words += [option, str(item)]
        return words

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        for option in fields(cls):
            name = "--" + option.name.replace("_", "-")
            if isinstance(option.default, bool):
                parser.add_argument(name, action=argparse.BooleanOptionalAction, default=option.default)
            elif option.name == "faults":
                parser.add_argument(name, action="append", default=[])
            else:
                parser.add_argument(name, type=type(option.default), default=option.default)

    @classmethod
    def of(cls, options: argparse.Namespace) -> Behaviour:
        return cls(**{option.name: getattr(options, option.name) for option in fields(cls)})


class Lengths:
    """A distribution of response lengths, inverted."""

    def __init__(self, text: str) -> None:
        """
        Raises:
            ConfigError: not one of the forms that `Behaviour.lengths` names.
        """
        self._kind, *words = text.split(":")
        self._numbers = _numbers(words)
        expected = {"fixed": 1, "uniform": 2, "lognormal": 3}
        if expected.get(self._kind) != len(self._numbers):
            raise ConfigError(
                f"lengths = '{text}': expected fixed:N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA:CAP; mend it"
            )

    def at(self, quantile: float) -> int:
        """Tokens, at least 1; `quantile` in (0, 1)."""
        if self._kind == "fixed":
            return int(self._numbers[0])
        if self._kind == "uniform":
            low, high = self._numbers
            return int(low + quantile * (high - low + 1))
        median, sigma, cap = self._numbers
        return max(1, round(min(cap, median * math.exp(sigma * NormalDist().inv_cdf(quantile)))))


def _numbers(words: Sequence[str]) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        return []
