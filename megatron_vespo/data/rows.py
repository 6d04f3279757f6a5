"""Rows of data files, with words for what they lack.

A path is one parquet or jsonl file, or the directory of a Hugging Face dataset: a clone of its repository (shards
whose names tell the split) or what `save_to_disk` writes (Arrow streams).  `datasets` itself is not needed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vespo.config import ConfigError

SHARD = re.compile(r"(?P<split>.+?)(?:[-_](?P<index>\d+)(?:-of-(?P<total>\d+))?)?")
"""Stems of data files: train, train-00000-of-00004, 0000."""
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Row:
    where: str
    """File name and row (from 0) or line (from 1), for error messages."""
    fields: Mapping[str, Any]

    def get(self, column: str, setting: str = "") -> Any:
        """The value in a column, into whose structs dots lead.

        Args:
            setting: that names another column, for the error message.

        Raises:
            ConfigError: there is none; the message says what is there instead.
        """
        value: Any = self.fields
        for depth, name in enumerate(names := column.split(".")):
            parent = ".".join(names[:depth])
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{self.where}: '{parent}' = {short(value)}: expected a table with '{name}'; "
                    f"{_remedy('add it', setting)}"
                )
            if value.get(name) is None:
                present = [key for key, filled in value.items() if filled is not None]
                raise _missing(self.where, ".".join(names[: depth + 1]), present, setting)
            value = value[name]
        return value


def read_rows(path: Path, columns: Mapping[str, str], split: str = "train") -> list[Row]:
    """Every row of a file, or of one split of a dataset directory.

    Args:
        columns: the columns that every row must have, each with the setting that names another one ("": there is none).

    Raises:
        ConfigError: it cannot be read, holds no row or no such split, or a row lacks a column.
    """
    if path.is_dir():
        files = _files_of_dataset(path, split)
    elif path.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(
            f"file = '{path}': expected a name that ends in .parquet or .jsonl, or a dataset's directory; convert it"
        )
    elif not path.is_file():
        raise ConfigError(f"file = '{path}': no such file; give the path of a parquet or jsonl file")
    else:
        files = [path]
    root = path if path.is_dir() else path.parent
    rows = [row for file in files for row in _read(file, str(file.relative_to(root)), columns)]
    if not rows:
        raise ConfigError(f"file = '{path}': expected at least one row, found none; give a file with rows")
    for row in rows:
        for column, setting in columns.items():
            row.get(column, setting)
    return rows


def short(value: Any) -> str:
    """How a value looks in an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _missing(where: str, column: str, present: Sequence[str], setting: str) -> ConfigError:
    near = difflib.get_close_matches(column.rpartition(".")[2], present, n=1, cutoff=0.5)
    remedy = _remedy(f"rename '{near[0]}'" if near else "add it", setting)
    return ConfigError(f"{where}: missing '{column}', found {', '.join(present) or 'nothing'}; {remedy}")


def _remedy(what: str, setting: str) -> str:
    return f"{what}, or set {setting}" if setting else what


def _read(file: Path, name: str, columns: Mapping[str, str]) -> list[Row]:
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ConfigError(
                f"file = '{file}': expected data, it is a pointer to them; run `git lfs pull` there"
            )
    return READERS[file.suffix](file, name, columns)


def _read_parquet(file: Path, name: str, columns: Mapping[str, str]) -> list[Row]:
    try:
        with pq.ParquetFile(file) as opened:
            return _rows_of_table(opened.schema_arrow.names, opened.read, name, columns)
    except (pa.ArrowException, OSError) as err:
        raise ConfigError(f"file = '{file}': expected parquet, but {err}; write it again") from err


def _read_arrow(file: Path, name: str, columns: Mapping[str, str]) -> list[Row]:
    try:
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
            return _rows_of_table(stream.schema.names, stream.read_all().select, name, columns)
    except (pa.ArrowException, OSError) as err:
        raise ConfigError(f"file = '{file}': expected an Arrow stream, but {err}; save it again") from err


def _rows_of_table(
    present: Sequence[str], read: Callable[[list[str]], pa.Table], name: str, columns: Mapping[str, str]
) -> list[Row]:
    """Reads no column that is not needed: the others of a dataset can be most of it."""
    needed = list(dict.fromkeys(column.split(".")[0] for column in columns))
    for column, setting in columns.items():
        if (top := column.split(".")[0]) not in present:
            raise _missing(name, top, present, setting)
    return [Row(f"{name} row {i}", fields) for i, fields in enumerate(read(needed).to_pylist())]


def _read_jsonl(file: Path, name: str, columns: Mapping[str, str]) -> list[Row]:
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as err:  # no JSON, or no UTF-8
            raise ConfigError(
                f"file = '{file}', line {number}: expected one JSON object, but {err}; mend it"
            ) from None
        if not isinstance(fields, dict):
            raise ConfigError(
                f"file = '{file}', line {number}: expected one JSON object, not {line[:40]!r}; mend it"
            )
        rows.append(Row(f"{name} line {number}", fields))
    return rows


READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".arrow": _read_arrow}


def _files_of_dataset(root: Path, split: str) -> list[Path]:
    if (root / "dataset_dict.json").is_file():
        known = _json(root / "dataset_dict.json", "splits")
        if split not in known:
            raise _no_split(root, split, known)
        return _files_of_dataset(root / split, split)
    if (root / "state.json").is_file():
        return _files_saved_to_disk(root)
    return _files_of_clone(root, split)


def _files_saved_to_disk(root: Path) -> list[Path]:
    files = [root / entry["filename"] for entry in _json(root / "state.json", "_data_files")]
    if missing := [file for file in files if not file.is_file()]:
        raise ConfigError(f"file = '{missing[0]}': no such file, state.json names it; copy the dataset again")
    return files


def _json(file: Path, key: str) -> Any:
    try:
        return json.loads(file.read_bytes())[key]
    except (ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f"file = '{file}': expected what `save_to_disk` writes, but {type(err).__name__}: {err}; save the dataset again"
        ) from err


@dataclass(frozen=True)
class _Shard:
    file: Path
    splits: tuple[str, ...]
    """What its name says, and the name of its folder."""
    index: int
    total: int | None


def _files_of_clone(root: Path, split: str) -> list[Path]:
    """The shards of a split, by their names; refuses what is ambiguous or incomplete rather than guess."""
    shards = [_shard(root, file) for suffix in (".parquet", ".jsonl") for file in root.rglob(f"*{suffix}")]
    shards = [shard for shard in shards if not _is_hidden(shard.file.relative_to(root))]
    found = sorted((s for s in shards if split in s.splits), key=lambda s: (s.index, s.file))
    if not found:
        raise _no_split(root, split, dict.fromkeys(shard.splits[0] for shard in shards))
    kinds = sorted({(str(s.file.parent.relative_to(root)), s.file.suffix, s.total) for s in found}, key=str)
    if len(kinds) > 1:
        names = ", ".join(str(shard.file.relative_to(root)) for shard in found[:4])
        raise ConfigError(
            f"directory = '{root}': split '{split}' is there in {len(kinds)} forms ({names}, ...), expected one; "
            "give the folder, or the file, of one of them"
        )
    if (total := found[0].total) not in (None, len(found)):
        raise ConfigError(
            f"directory = '{root}': split '{split}' has {len(found)} of {total} shards, expected all; copy the others"
        )
    return [shard.file for shard in found]


def _shard(root: Path, file: Path) -> _Shard:
    match = SHARD.fullmatch(file.stem)
    assert match is not None  # one character is enough
    folder = () if file.parent == root else (file.parent.name,)
    if match["split"].isdecimal():  # train/0000.parquet
        return _Shard(file, folder or (file.stem,), int(match["split"]), None)
    total = int(match["total"]) if match["total"] else None
    return _Shard(file, (match["split"], *folder), int(match["index"] or 0), total)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _no_split(root: Path, split: str, known: Iterable[str]) -> ConfigError:
    known = sorted(known)
    near = difflib.get_close_matches(split, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "name one of those, or give a file."
    return ConfigError(
        f"directory = '{root}': no split '{split}', found {', '.join(known) or 'no parquet or jsonl file'}; {hint}"
    )
