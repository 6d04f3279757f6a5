"""What a simulated engine says: every token, log-prob and expert is a function of its arguments, never of time.

A response opens with a token that names its place among the samples of its prompt.  An engine that is given a prompt
with the beginning of a response therefore goes on with that very response, whichever engine began it.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_vespo.rollout.model import read_facts
from megatron_vespo.rollout.simulated_engine.behaviour import Behaviour, Lengths

NUM_OPENINGS = 64
"""Samples of one prompt that differ; the next ones repeat them."""
NUM_WORDS = 64
"""Responses are made of token ids below this, printable ASCII to every byte-level tokenizer."""
NUM_EXPERT_ROWS = 1024

Words = NDArray[np.uint64]


def simulated_logp(
    token_ids: NDArray[Any], positions: NDArray[Any], version: int, temperature: float = 1.0
) -> NDArray[np.float32]:
    """What an engine of weight version `version` answers for tokens at positions of their sequence, nats.

    The temperature only scales it: there is no distribution behind it.
    """
    words = _mix(_mix(_words(token_ids) + _words(positions) * np.uint64(0x10001)) + np.uint64(version))
    return (-(0.01 + 4.0 * _unit(words)) / temperature).astype(np.float32)


def version_number(label: str) -> int:
    """The number that stands for a weight version in `simulated_logp`."""
    return int(label) if label.isdecimal() else zlib.crc32(label.encode())


@dataclass(frozen=True)
class Stream:
    """One response to one prompt, of which `done` tokens were given with the prompt."""

    key: int
    index: int
    done: int


class Content:
    """The responses of one model."""

    def __init__(self, model: Path, behaviour: Behaviour) -> None:
        """
        Raises:
            ConfigError: the model's directory is not complete, or `lengths` is nonsense.
        """
        self.facts = read_facts(model)
        self._model = model
        self._lengths = Lengths(behaviour.lengths)
        self._seed = behaviour.seed
        self._spells = behaviour.text
        self._stops = np.array(self.facts.stop_token_ids)
        self._spelling = np.setdiff1d(np.arange(NUM_WORDS), self._stops)
        self._first_opening = max(NUM_WORDS, self.facts.vocab_size // 2)

    def stream(self, ids: NDArray[np.int64], index: int) -> Stream:
        """Which response follows `ids`: the one that their end has begun, else sample `index` of them as a prompt."""
        begun = (ids >= self._first_opening) & (ids < self._first_opening + NUM_OPENINGS)
        opening = int(np.flatnonzero(begun)[-1]) if begun.any() else len(ids)
        if np.isin(ids[opening:], self._stops).any():  # a turn that ended long ago
            opening = len(ids)
        if opening < len(ids):
            index = int(ids[opening]) - self._first_opening
        digest = hashlib.blake2b(ids[:opening].tobytes(), digest_size=8, key=str(self._seed).encode())
        return Stream(int.from_bytes(digest.digest(), "little"), index % NUM_OPENINGS, len(ids) - opening)

    def remaining(self, stream: Stream) -> int:
        """Tokens from here up to and with the end of turn, at least 1."""
        quantile = float(_unit(_mix(_words(stream.index + 1) + np.uint64(stream.key))))
        length = self._lengths.at(min(max(quantile, 1e-9), 1 - 1e-9))
        return max(1, length - stream.done)

    def tokens(self, stream: Stream, num: int, *, stops: bool) -> NDArray[np.int64]:
        """[num] tokens of a response from here on, the last of which ends the turn if it `stops`."""
        places = _words(np.arange(stream.done, stream.done + num))
        spelled = _mix(_mix(places + np.uint64(stream.key)) + np.uint64(stream.index))
        ids = self._spelling[spelled % np.uint64(len(self._spelling))]
        if stream.done == 0 and num:
            ids[0] = self._first_opening + stream.index
        if stops and num:
            ids[-1] = self._stops[0]
        return ids

    def experts(self, ids: NDArray[np.int64], version: int) -> NDArray[np.int32]:
        """[len(ids), layers, K], distinct in each row; zeros in layers without a router, as SGLang sends them."""
        return self._expert_table(version)[ids % NUM_EXPERT_ROWS]

    def spell(self, ids: NDArray[np.int64]) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True) if self._spells else ""

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self._model / "tokenizer.json"))

    @lru_cache(maxsize=4)  # noqa: B019 - one Content lives as long as its process
    def _expert_table(self, version: int) -> NDArray[np.int32]:
        facts, k = self.facts, self.facts.experts_per_token
        table = np.zeros((NUM_EXPERT_ROWS, facts.num_layers, k), np.int32)
        rows = _words(np.arange(NUM_EXPERT_ROWS))[:, None] + np.uint64(version) * np.uint64(NUM_EXPERT_ROWS)
        first = _mix(_mix(rows) + _words(np.array(facts.router_layers)))
        chosen = (first[..., None] + _words(np.arange(k))) % np.uint64(max(1, facts.num_experts))
        table[:, list(facts.router_layers)] = chosen.astype(np.int32)
        return table


def _words(values: NDArray[Any] | int) -> Words:
    return np.asarray(values).astype(np.uint64)


def _mix(words: Words) -> Words:
    """splitmix64: every bit of the result depends on every bit of the argument."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def _unit(words: Words) -> NDArray[np.float64]:
    """Uniform in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
