"""What engines said about the same tokens: the parquet schema that runs and probes write, and other frameworks can.

A file has one row per sequence; only `response_ids`, `behavior_logp` and one of `policy_logp`, `natural_logp` are required.
Every other column makes more of the report possible (docs/doctor.md).  Columns that go by the names of other frameworks
are understood (docs/evidence.md); what a file says and what it cannot mean is refused here, so that no metric meets it.

Shape key:  B sequences, N = P + T tokens of one of them (prompt and response), S response tokens of all, R rows: the tokens
            that were processed, N - 1 of each sequence with experts; L layers with a router, K experts per token.
"""

from __future__ import annotations

import difflib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_vespo import routes
from megatron_vespo.config import ConfigError
from megatron_vespo.rundir import ROLLOUT_SCHEMA, rollout_files
from megatron_vespo.types import Doubles, Experts, Floats, Ints, Mask, RunError

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


_FACTS = b"megatron_vespo"
_EXPERTS = ("behavior_experts", "engine_experts", "natural_experts", "shadow_experts")
_LOGPS = ("behavior_logp", "policy_logp", "natural_logp", "engine_logp", "repeat_logp", "replayed_logp")
_NUMBERS = ("reward", "advantage", "log_w", "coefficient")
_GROUP_BYTES = 2**26
"""Of a row group, which is what a reader holds at once."""

_ALIASES: Mapping[str, tuple[str, ...]] = {
    "prompt_ids": ("prompts",),
    "response_ids": ("responses", "completion_ids", "output_ids"),
    "tokens": ("input_ids",),
    "response_length": ("response_lengths",),
    "attention_mask": (),
    "sampled": ("response_mask", "loss_mask", "loss_masks", "token_mask", "completion_mask"),
    "behavior_logp": (
        "rollout_log_probs", "rollout_logprobs", "generation_logprobs", "sampling_per_token_logps", "logprobs",
    ),
    "policy_logp": ("old_log_probs", "log_probs", "prev_logprobs", "old_per_token_logps"),
    "natural_logp": (),
    "engine_logp": (),
    "repeat_logp": (),
    "replayed_logp": (),
    "entropy": ("entropys", "entropies"),
    "versions": (),
    "train_version": (),
    "step": (),
    "reward": ("raw_reward",),
    "advantage": ("advantages",),
    "log_w": (),
    "coefficient": (),
    "uid": (),
    "response_text": ("response", "completion"),
    "behavior_experts": ("rollout_routed_experts", "routed_experts"),
    "engine_experts": (),
    "natural_experts": (),
    "shadow_experts": (),
    "margin": (),
}  # fmt: skip
"""What is read, and what slime, miles, verl, NeMo-RL, TRL, SkyRL and AReaL call it.  Three roles are not in the schema: `tokens`
(prompt and response together), `response_length`, and `attention_mask` (false where a sequence is padded)."""


def write_evidence(file: Path, rows: Sequence[Mapping[str, Any]], facts: Facts) -> Path:
    """Write one row per sequence to `file`; a reader sees the whole file or none.

    Args:
        rows: values by column of EVIDENCE_SCHEMA, numpy arrays where they are lists; experts as [N - 1, L, K] of any whole
            number, a margin as [N - 1, L].  A column that is absent or None is null.

    Raises:
        RunError: experts that are none (`routes.encode`).
    """
    unknown = {name for row in rows for name in row} - set(EVIDENCE_SCHEMA.names)
    if unknown:
        raise ValueError(f"columns {sorted(unknown)}: expected columns of EVIDENCE_SCHEMA")
    columns = [
        pa.array([_cell(column.name, row.get(column.name), facts) for row in rows], type=column.type)
        for column in EVIDENCE_SCHEMA
    ]
    table = pa.Table.from_arrays(
        columns, schema=EVIDENCE_SCHEMA.with_metadata({_FACTS: json.dumps(asdict(facts)).encode()})
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    pq.write_table(
        table,
        partial,
        compression={name: "none" if name in _EXPERTS else "zstd" for name in table.column_names},
        row_group_size=max(1, len(rows) * _GROUP_BYTES // max(table.nbytes, _GROUP_BYTES)),
    )
    partial.replace(file)
    return file


def _cell(column: str, value: Any, facts: Facts) -> Any:
    if value is None:
        return None
    if column in _EXPERTS:
        return routes.encode(value, facts.num_experts)
    return np.asarray(value, np.float16).tobytes() if column == "margin" else value


def read_evidence(
    source: Path | Sequence[Path],
    *,
    kind: Literal["evidence", "rollouts"] | None = None,
    columns: Mapping[str, str] | None = None,
    experts_shape: tuple[int, int] | None = None,
    limit: int | None = None,
) -> Evidence:
    """Evidence of one or more files, read in row groups, checked, and flattened.

    Sequences of which no token was sampled (aborted, or taken out by their mask) are left out; the name says how many.

    Args:
        source: parquet files, or a directory of them, or a run directory.
        kind: which files of a run directory; default: evidence where there is any, else rollouts.
        columns: what a file calls a column, by our name: {"behavior_logp": "their_name"}; goes before aliases.
        experts_shape: layers and experts per token, for experts that come as base64 or flat lists.
        limit: of response tokens, about: beyond it evenly spaced sequences are read, and the name says so.

    Raises:
        ConfigError: no such file or column, or a column that could mean two things.
        RunError: values that cannot be, or files that do not belong together.
    """
    files = [_File.open(file, columns or {}) for file in _files(source, kind)]
    _agree(files)
    chosen, note = _evenly(files, limit)
    sequences = [
        one for file, rows in zip(files, chosen, strict=True) for one in file.sequences(rows, experts_shape)
    ]
    kept = [one for one in sequences if one.sampled.any()]
    if not kept:
        raise RunError(
            f"{_name(source)}: {len(sequences)} sequences without a sampled token; expected some to compare"
        )
    if len(kept) < len(sequences):
        note += f" ({len(sequences) - len(kept)} without a sampled token left out)"
    return _flat(f"{_name(source)}{note}", files[0].facts, kept)


def _name(source: Path | Sequence[Path]) -> str:
    return str(source) if isinstance(source, Path) else ", ".join(map(str, source))


def _files(source: Path | Sequence[Path], kind: str | None) -> list[Path]:
    if not isinstance(source, Path):
        files = list(source)
    elif not source.is_dir():
        files = [source]
    elif (source / "config.toml").exists():
        of_run = {
            "evidence": sorted((source / "evidence").glob("*.parquet")),
            "rollouts": rollout_files(source),
        }
        files = of_run[kind or ("evidence" if of_run["evidence"] else "rollouts")]
    else:
        files = sorted(source.glob("*.parquet"))
    absent = [file for file in files if not file.exists()]
    if absent or not files:
        what = f"{absent[0]}: no such file" if absent else f"{_name(source)}: no {kind or 'parquet'} files"
        raise ConfigError(
            f"{what}; expected a parquet file, a directory of them, or a run directory (docs/evidence.md)"
        )
    return files


@dataclass(frozen=True, kw_only=True)
class _File:
    """One parquet file, and what its columns mean."""

    path: Path
    parquet: pq.ParquetFile
    columns: Mapping[str, str]
    """Their names by ours."""
    facts: Facts

    @classmethod
    def open(cls, path: Path, named: Mapping[str, str]) -> _File:
        try:
            parquet = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as err:
            raise RunError(f"{path}: no parquet file ({err}); was it written to its end?") from err
        return cls(
            path=path,
            parquet=parquet,
            columns=_meanings(path, parquet.schema_arrow, named),
            facts=_facts(path, parquet.schema_arrow),
        )

    @property
    def num_rows(self) -> int:
        return self.parquet.metadata.num_rows

    def num_tokens(self) -> int:
        """About: some frameworks' log-probs cover the prompt."""
        column = self.columns["behavior_logp"]
        groups = range(self.parquet.num_row_groups)
        return sum(
            pc.sum(pc.list_value_length(self.parquet.read_row_group(group, columns=[column])[column])).as_py()
            or 0
            for group in groups
        )

    def sequences(self, chosen: Ints, experts_shape: tuple[int, int] | None) -> Iterator[_Sequence]:
        """Of the chosen rows, one row group in memory at a time."""
        start = 0
        for group in range(self.parquet.num_row_groups):
            end = start + self.parquet.metadata.row_group(group).num_rows
            mine = chosen[(chosen >= start) & (chosen < end)]
            if len(mine):
                table = self.parquet.read_row_group(group, columns=list(self.columns.values())).take(
                    mine - start
                )
                cells = {ours: _cells(table[theirs]) for ours, theirs in self.columns.items()}
                for place, row in enumerate(mine):
                    values = {
                        ours: column[place] for ours, column in cells.items() if column[place] is not None
                    }
                    yield _Row(f"{self.path}: row {row}", values, self.columns).sequence(
                        self.facts, experts_shape
                    )
            start = end


def _meanings(path: Path, schema: pa.Schema, named: Mapping[str, str]) -> dict[str, str]:
    """Which column of a file is what: as it was named by the caller, else by our name, else by the one alias that is there."""
    for ours, theirs in named.items():
        for name, known in ((ours, list(_ALIASES)), (theirs, schema.names)):
            if name not in known:
                close = difflib.get_close_matches(name, known, 3, 0.4) or sorted(known)
                raise ConfigError(
                    f"columns: {ours} = '{theirs}': {path} has no '{name}'; expected one of {', '.join(close)}"
                )
    found: dict[str, str] = {}
    for ours, aliases in _ALIASES.items():
        name = named.get(ours, ours if ours in schema.names else None)
        candidates = (
            [name]
            if name
            else [a for a in aliases if a in schema.names and _fits(ours, schema.field(a).type)]
        )
        if len(candidates) > 1:
            raise ConfigError(
                f"{path}: {' and '.join(candidates)} may each be {ours}; say which with columns = {{'{ours}': ...}}"
            )
        if name and not _fits(ours, schema.field(name).type):
            raise ConfigError(
                f"{path}: {ours} = '{name}' is {schema.field(name).type}; expected {_EXPECTED[_kind(ours)]}"
            )
        if candidates:
            found[ours] = candidates[0]
    for needed in (("response_ids", "tokens"), ("behavior_logp",), ("policy_logp", "natural_logp")):
        if not any(ours in found for ours in needed):
            names = [name for ours in needed for name in (ours, *_ALIASES[ours])]
            raise ConfigError(
                f"{path}: has no column for {' or '.join(needed)}; expected one of {', '.join(names)}, or "
                f"columns = {{'{needed[0]}': one of {', '.join(schema.names)}}}"
            )
    return found


_EXPECTED = {
    "number": "a number for each sequence",
    "text": "a text for each sequence",
    "experts": "bytes of routes.py, base64 of int32, or lists",
    "bytes": "bytes",
    "list": "a list of numbers for each sequence",
}


def _kind(ours: str) -> str:
    if ours in _EXPERTS:
        return "experts"
    kinds = {"margin": "bytes", "uid": "text", "response_text": "text"}
    numbers = ("response_length", "train_version", "step", *_NUMBERS)
    return kinds.get(ours, "number" if ours in numbers else "list")


def _fits(ours: str, type_: pa.DataType) -> bool:
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    is_bytes = pa.types.is_binary(type_) or pa.types.is_large_binary(type_)
    is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    is_number = _is_number(type_)
    fitting = {
        "number": is_number,
        "text": is_text or is_number,
        "experts": is_bytes or is_text or is_list,
        "bytes": is_bytes,
        "list": is_list and _is_number(type_.value_type),
    }
    return fitting[_kind(ours)] or pa.types.is_null(type_)


def _is_number(type_: pa.DataType) -> bool:
    return (pa.types.is_primitive(type_) and not pa.types.is_temporal(type_)) or pa.types.is_null(type_)


def _facts(path: Path, schema: pa.Schema) -> Facts:
    """What the file says; else what the configuration of the run that it lies in says; else nothing."""
    said = (schema.metadata or {}).get(_FACTS)
    if said is not None:
        known = {one.name for one in fields(Facts)}
        return Facts(**{name: value for name, value in json.loads(said).items() if name in known})
    config = path.parent.parent / "config.toml"
    if not config.exists():
        return Facts()
    run = tomllib.loads(config.read_text())
    trainer = run.get("trainer", {})
    return Facts(
        model=str(run.get("model", "")),
        temperature=run.get("sampling", {}).get("temperature", 1.0),
        router_replay=trainer.get("router_replay", "off"),
        trainer_dtype=trainer.get("dtype", "bfloat16"),
        engine_dtype=run.get("rollout", {}).get("dtype", "bfloat16"),
    )


def _agree(files: Sequence[_File]) -> None:
    """Refuse files whose numbers do not mean the same."""
    for one, other in itertools.pairwise(files):
        a, b = asdict(one.facts), asdict(other.facts)
        for name in a:
            if a[name] != b[name] and name != "versions":
                raise RunError(
                    f"{one.path} and {other.path}: {name} = {a[name]!r} and {b[name]!r}; expected files of one model and setting: "
                    "read them one by one"
                )


def _evenly(files: Sequence[_File], limit: int | None) -> tuple[list[Ints], str]:
    """Which rows of each file are read, and what the name says about it."""
    ends = np.cumsum([file.num_rows for file in files])
    num, note = int(ends[-1]), ""
    chosen = np.arange(num)
    if limit is not None and (tokens := sum(file.num_tokens() for file in files)) > limit:
        chosen = np.unique(np.linspace(0, num - 1, max(1, num * limit // tokens)).round().astype(np.int64))
        note = f" ({len(chosen)} of {num} sequences, evenly spaced)"
    by_file = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return [rows - end + file.num_rows for rows, end, file in zip(by_file, ends, files, strict=True)], note


def _cells(column: pa.ChunkedArray) -> list[Any]:
    """One value per row: numpy for lists of numbers, arrow for lists of lists, None for null."""
    if not (pa.types.is_nested(column.type)):
        return column.to_pylist()
    array = column.combine_chunks()
    array = array.cast(pa.large_list(array.type.value_type))
    values = (
        array.values
        if pa.types.is_nested(array.type.value_type)
        else array.values.to_numpy(zero_copy_only=False)
    )
    offsets, is_null = array.offsets.to_numpy(), array.is_null().to_numpy(zero_copy_only=False)
    return [
        None if null else values[start:end]
        for null, (start, end) in zip(is_null, itertools.pairwise(offsets), strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Sequence:
    """One sequence, checked: without padding, everything aligned with its tokens."""

    tokens: Ints
    sampled: Mask
    values: Mapping[str, Floats]
    """[T] log-probs and entropies."""
    version_gap: Ints | None
    experts: Mapping[str, Experts]
    margin: Floats | None
    numbers: Mapping[str, float]
    uid: str | None
    text: str | None


class _Row:
    """One row of a file, on its way to a `_Sequence`."""

    def __init__(self, where: str, values: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self._where, self._values, self._columns = where, values, columns
        self._tokens, self._num_response = self._extent()
        mask = values.get("attention_mask")
        self._kept = np.ones(len(self._tokens), np.bool_) if mask is None else np.asarray(mask, np.bool_)
        if len(self._kept) != len(self._tokens):
            raise self._error(
                "attention_mask", f"{len(self._kept)} values", f"{len(self._tokens)}, one per token"
            )

    def sequence(self, facts: Facts, experts_shape: tuple[int, int] | None) -> _Sequence:
        """What the row says, checked."""
        num_kept = int(self._kept[len(self._kept) - self._num_response :].sum())
        mask = self._of_response("sampled")
        sampled = np.ones(num_kept, np.bool_) if mask is None else mask.astype(np.bool_)
        values = {name: self._logp(name, sampled) for name in (*_LOGPS, "entropy") if name in self._values}
        if "behavior_logp" not in values or not {"policy_logp", "natural_logp"} & set(values):
            raise self._error(
                "behavior_logp, policy_logp", "null", "log-probs of engine and trainer in every row"
            )
        values.setdefault("policy_logp", values.get("natural_logp", values["behavior_logp"]))
        values.setdefault(
            "replayed_logp" if facts.router_replay == "engine" else "natural_logp", values["policy_logp"]
        )
        versions, trained = self._of_response("versions"), self._values.get("train_version")
        experts = {
            name.removesuffix("_experts"): self._experts(name, facts.num_experts, experts_shape)
            for name in _EXPERTS
            if name in self._values
        }
        return _Sequence(
            tokens=self._tokens[self._kept].astype(np.int32),
            sampled=sampled,
            values=values,
            version_gap=None
            if versions is None or trained is None
            else (trained - versions).astype(np.int32),
            experts=experts,
            margin=self._margin(next((of.shape[1] for of in experts.values()), None)),
            numbers={name: self._values[name] for name in ("step", *_NUMBERS) if name in self._values},
            uid=self._text("uid"),
            text=self._text("response_text"),
        )

    def _extent(self) -> tuple[NDArray[Any], int]:
        """[N] prompt and response, padding included; and T."""
        prompt, response, whole = (
            self._values.get(name) for name in ("prompt_ids", "response_ids", "tokens")
        )
        if whole is None:
            if response is None:
                raise self._error("response_ids", "null", "token ids in every row")
            return np.concatenate([[] if prompt is None else prompt, response]).astype(np.int64), len(
                response
            )
        return whole, len(response) if response is not None else self._response_length(len(whole))

    def _response_length(self, num_tokens: int) -> int:
        """T, of a sequence that is only known as a whole."""
        if (length := self._values.get("response_length")) is not None:
            return int(length)
        if (mask := self._values.get("sampled")) is not None:
            is_whole = len(mask) >= num_tokens - 1
            return len(mask) - int(np.argmax(mask)) if is_whole and np.any(mask) else len(mask)
        num = len(self._values.get("behavior_logp", ()))
        if num >= num_tokens - 1:
            raise self._error(
                "tokens",
                f"{num_tokens} with {num} log-probs",
                "a response_length or a mask, which tells where the response begins",
            )
        return num

    def _of_response(self, name: str) -> NDArray[Any] | None:
        """[T] without padding; what covers the whole sequence, or all of it but its first token, ends where the response ends."""
        values = self._values.get(name)
        if values is None:
            return None
        num_response, num = self._num_response, len(self._tokens)
        if len(values) not in (num_response, num, num - 1) or len(values) < num_response:
            raise self._error(
                name,
                f"{len(values)} values",
                f"{num_response} (response), or {num} or {num - 1} (whole sequence)",
            )
        return values[len(values) - num_response :][self._kept[num - num_response :]]

    def _logp(self, name: str, sampled: Mask) -> Floats:
        values = self._of_response(name)
        assert values is not None
        fine = np.isfinite(values) & ((values <= 1e-3) if name in _LOGPS else (values >= -1e-3))
        bad = np.flatnonzero(sampled & ~fine)
        if len(bad):
            expected = (
                "a finite log-prob of at most 0" if name in _LOGPS else "a finite entropy of at least 0"
            )
            raise self._error(name, f"{values[bad[0]]} at response token {bad[0]}", expected)
        return np.where(sampled, values, 0).astype(np.float32)

    def _experts(self, name: str, num_experts: int, shape: tuple[int, int] | None) -> Experts:
        """[N - 1, L, K] without padding; a row for the last token, which nothing hangs on, is dropped."""
        try:
            experts = _choices(self._values[name], num_experts, shape)
        except RunError as err:
            raise RunError(f"{self._where}: {self._columns[name]}: {err}") from err
        num = len(self._tokens)
        if len(experts) not in (num - 1, num):
            raise self._error(
                name,
                f"{len(experts)} rows of experts",
                f"{num - 1}, one for each token of prompt and response but the last",
            )
        return experts[np.flatnonzero(self._kept)[:-1]]

    def _margin(self, num_layers: int | None) -> Floats | None:
        """[N - 1, L] without padding; None without the experts that it is of."""
        value, num_rows = self._values.get("margin"), len(self._tokens) - 1
        if value is None or num_layers is None:
            return None
        if len(value) != 2 * num_rows * num_layers:
            raise self._error(
                "margin",
                f"{len(value)} bytes",
                f"float16 for each of {num_rows} tokens and {num_layers} layers, {2 * num_rows * num_layers} bytes",
            )
        margin = np.frombuffer(value, np.float16).reshape(num_rows, num_layers).astype(np.float32)
        return margin[np.flatnonzero(self._kept)[:-1]]

    def _text(self, name: str) -> str | None:
        value = self._values.get(name)
        return None if value is None else str(value)

    def _error(self, name: str, what: str, expected: str) -> RunError:
        return RunError(f"{self._where}: {self._columns.get(name, name)} = {what}; expected {expected}")


def _choices(value: Any, num_experts: int, shape: tuple[int, int] | None) -> Experts:
    """[rows, L, K] of any form in which experts come; rows that hold a sentinel become zeros, as in `routes.decode`."""
    if isinstance(value, bytes):
        return routes.decode(value)
    if isinstance(value, pa.Array) and pa.types.is_nested(value.type.value_type):
        shape = _shape_of(value)
    if shape is None:
        raise ConfigError("experts without their shape: say experts_shape = (layers, experts per token)")
    if isinstance(value, str):
        experts = routes.from_base64(value, *shape)
    else:
        flat = _leaves(value)
        if flat.size % (shape[0] * shape[1]):
            raise RunError(
                f"{flat.size} experts: expected a multiple of {shape[0]} layers x {shape[1]} experts"
            )
        experts = flat.reshape(-1, *shape)
    experts, _ = routes.without_sentinels(experts)
    return routes.narrow(experts, num_experts or int(experts.max(initial=0)) + 1)


def _shape_of(rows: pa.Array) -> tuple[int, int]:
    """Layers and experts of rows that are lists of lists, all of the same length."""
    lengths = [pc.unique(pc.list_value_length(level)).to_pylist() for level in (rows, rows.flatten())]
    if any(len(length) != 1 for length in lengths):
        raise RunError(f"lists of {lengths} layers and experts: expected the same number in every row")
    return lengths[0][0], lengths[1][0]


def _leaves(value: Any) -> NDArray[Any]:
    while isinstance(value, pa.Array) and pa.types.is_nested(value.type):
        value = value.flatten()
    return value.to_numpy(zero_copy_only=False) if isinstance(value, pa.Array) else value


def _flat(name: str, facts: Facts, sequences: Sequence[_Sequence]) -> Evidence:
    """All sequences, one after the other."""
    named = {column for one in sequences for column in one.experts}
    routed = [bool(named) and set(one.experts) == named for one in sequences]
    having = [one for one, is_routed in zip(sequences, routed, strict=True) if is_routed]
    shapes = sorted({experts.shape[1:] for one in sequences for experts in one.experts.values()})
    if len(shapes) > 1:
        raise RunError(
            f"{name}: experts of {shapes[0]} and {shapes[1]} layers and experts per token; expected one model"
        )
    return Evidence(
        name=name,
        facts=facts,
        num_prompt=np.array([len(one.tokens) - len(one.sampled) for one in sequences], np.int32),
        num_response=np.array([len(one.sampled) for one in sequences], np.int32),
        tokens=np.concatenate([one.tokens for one in sequences]),
        is_sampled=np.concatenate([one.sampled for one in sequences]),
        version_gap=_gaps(name, sequences),
        step=_steps(sequences),
        uid=_texts([one.uid for one in sequences]),
        text=_texts([one.text for one in sequences]),
        is_routed=np.array(routed, np.bool_),
        experts={
            column: np.concatenate([one.experts[column] for one in having])
            for column in sorted(named)
            if having
        },
        margin=_margins(having),
        **{column: _of_tokens(column, sequences) for column in (*_LOGPS, "entropy")},
        **{column: _of_sequences(column, sequences) for column in _NUMBERS},
    )


def _of_tokens(column: str, sequences: Sequence[_Sequence]) -> Any:
    if not any(column in one.values for one in sequences):
        return None
    lacking = np.float32(np.nan)
    return np.concatenate([one.values.get(column, np.full(len(one.sampled), lacking)) for one in sequences])


def _of_sequences(column: str, sequences: Sequence[_Sequence]) -> Any:
    values = np.array([one.numbers.get(column, np.nan) for one in sequences], np.float64)
    return None if np.isnan(values).all() else values


def _steps(sequences: Sequence[_Sequence]) -> Ints | None:
    steps = [one.numbers.get("step") for one in sequences]
    return None if None in steps else np.array(steps, np.int32)


def _texts(texts: Sequence[str | None]) -> list[str] | None:
    return [text or "" for text in texts] if any(texts) else None


def _gaps(name: str, sequences: Sequence[_Sequence]) -> Ints | None:
    gaps = [one.version_gap for one in sequences]
    known = [gap for gap in gaps if gap is not None]
    if known and len(known) < len(gaps):
        raise RunError(
            f"{name}: versions of {len(known)} of {len(gaps)} sequences; expected them of all or of none: read the files one by one"
        )
    return np.concatenate(known) if known else None


def _margins(routed: Sequence[_Sequence]) -> Floats | None:
    """nan where a sequence lacks it."""
    widths = {one.margin.shape[1] for one in routed if one.margin is not None}
    if not widths:
        return None
    lacking = [np.full((len(one.tokens) - 1, max(widths)), np.nan, np.float32) for one in routed]
    return np.concatenate(
        [blank if one.margin is None else one.margin for one, blank in zip(routed, lacking, strict=True)]
    )
