"""What engines said about the same tokens: the parquet schema that runs and probes write, and other frameworks can.

A file has one row per sequence; only `response_ids`, `behavior_logp` and one of `policy_logp`, `natural_logp` are required.
Every other column makes more of the report possible (docs/doctor.md).

Shape key:  B sequences, N = P + T tokens of one of them (prompt and response), S response tokens of all, R rows: the tokens
            that were processed, N - 1 of each sequence with experts; L layers with a router, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from megatron_vespo.rundir import ROLLOUT_SCHEMA
from megatron_vespo.types import Doubles, Experts, Floats, Ints, Mask

EVIDENCE_SCHEMA = pa.schema([
    *ROLLOUT_SCHEMA,
    ("natural_logp", pa.list_(pa.float32())),  # trainer, train_version's weights, its own choice of experts
    ("repeat_logp", pa.list_(pa.float32())),  # the same once more: the trainer's own noise
    ("replayed_logp", pa.list_(pa.float32())),  # trainer, the experts of behavior_experts
    ("entropy", pa.list_(pa.float32())),  # of the trainer's next-token distribution, nats
    ("behavior_experts", pa.binary()),  # [N - 1, L, K] of the engine when it sampled, in the format of routes.py
    ("engine_experts", pa.binary()),  # of the engine's prefill of the whole sequence, train_version's weights
    ("natural_experts", pa.binary()),  # of the trainer, free
    ("shadow_experts", pa.binary()),  # what the trainer would have chosen in each layer of the replayed pass
    ("margin", pa.binary()),  # [N - 1, L] float16, score of the K-th expert minus that of the next, trainer, free
])  # fmt: skip
"""Columns of an evidence file, over those of a rollout file; log-probs are [T] nats at the sampling temperature."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a file as a whole: JSON under the key "megatron_vespo" of the parquet metadata; all optional."""

    model: str = ""
    num_experts: int = 0
    """0 for dense models."""
    temperature: float = 1.0
    top_p: float = 1.0
    router_replay: str = "off"
    """"engine": policy_logp is the replayed pass; "trainer" or "off": the natural one."""
    trainer_dtype: str = ""
    engine_dtype: str = ""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of packages, e.g. {"sglang": "0.5.23"}."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One or more files, flattened; what was not recorded is None, what single sequences lack is nan."""

    name: str
    """For headings and messages: the path that was read."""
    facts: Facts
    num_prompt: Ints
    """[B] P; 0 where prompts were not recorded."""
    num_response: Ints
    """[B] T"""
    tokens: Ints
    """[sum N] prompt and response of each sequence, one after the other."""
    is_sampled: Mask
    """[S] false where an environment wrote the token."""
    behavior_logp: Floats
    """[S] M: the engine, when it sampled."""
    policy_logp: Floats
    """[S] the trainer as it trains: natural, or replayed (Facts.router_replay)."""
    natural_logp: Floats | None
    """[S] A: the trainer with its own choice of experts."""
    engine_logp: Floats | None = None
    """[S] M': the engine's prefill of the same tokens under the trainer's weights."""
    repeat_logp: Floats | None = None
    """[S] A2: natural_logp computed once more."""
    replayed_logp: Floats | None = None
    """[S] B: the trainer with the experts that the engine used when it sampled."""
    entropy: Floats | None = None
    """[S]"""
    version_gap: Ints | None = None
    """[S] trainer version minus the version that sampled the token."""
    step: Ints | None = None
    """[B]"""
    reward: Doubles | None = None
    """[B]"""
    advantage: Doubles | None = None
    """[B]"""
    log_w: Doubles | None = None
    """[B] nan where the update was left out."""
    coefficient: Doubles | None = None
    """[B]"""
    uid: list[str] | None = None
    text: list[str] | None = None
    """[B] of the response."""
    is_routed: Mask
    """[B] sequences whose experts are known, in all columns of `experts`."""
    experts: Mapping[str, Experts]
    """[R, L, K] by who chose: "behavior", "engine", "natural", "shadow"; R counts the rows of routed sequences only.  Row p of a
    sequence holds the experts used while processing token p: the log-prob of response token t hangs on row P - 1 + t."""
    margin: Floats | None = None
    """[R, L]"""

    @property
    def sequence_of_token(self) -> Ints:
        """[S] the sequence that each response token belongs to."""
        return np.repeat(np.arange(len(self.num_response), dtype=np.int32), self.num_response)
