"""Prompt and demonstration files, read with the model's chat template into token ids.

Files are parquet or jsonl, one row a prompt (the DAPO-Math layout) or one row a demonstration (a column
`messages`).  What a row lacks is found here, before any process starts.  `EpochStream` deals the rows out
in an endless order that a resumed run continues where it stopped.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_vespo.config import ConfigError, PromptsConfig, SftDataConfig
from megatron_vespo.types import Ints, Prompt, TrainSequence

log = logging.getLogger(__name__)

T = TypeVar("T")

ROLES = ("system", "user", "assistant", "tool")


class EpochStream(Generic[T], Iterator[T]):
    """The items again and again: every item exactly once per epoch, each epoch in its own seeded order.

    The order is a function of (seed, epoch) alone, so `EpochStream(items, seed, shuffle, start=n)` continues
    a stream from which n items were taken.
    """

    def __init__(self, items: Sequence[T], seed: int, shuffle: bool, start: int = 0) -> None:
        if not items:
            raise ConfigError("items = []: expected at least one to stream; give a file with rows")
        self._items = items
        self._seed = seed
        self._shuffle = shuffle
        self._epoch, self._order = -1, np.arange(len(items))
        self.position = start
        """Items taken since the beginning of the first epoch."""

    def __next__(self) -> T:
        epoch, offset = divmod(self.position, len(self._items))
        if self._shuffle and epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                np.random.default_rng([self._seed, epoch]).permutation(len(self._items)),
            )
        self.position += 1
        return self._items[self._order[offset]]

    def take(self, num: int) -> list[T]:
        """The next `num` items, across the end of an epoch if need be."""
        return [next(self) for _ in range(num)]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory; never asks the network.

    Raises:
        ConfigError: no such directory, no tokenizer in it, no chat template, or no end-of-turn token.
    """
    if not directory.is_dir():
        raise ConfigError(
            f"model = '{directory}': no such directory; give a local Hugging Face model directory"
        )
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((directory / name).is_file() for name in names):
        raise ConfigError(
            f"model = '{directory}': expected one of {', '.join(names)}, found none; "
            "copy the model's tokenizer files into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"model = '{directory}': its tokenizer cannot be read: {err}; mend its files"
        ) from err
    for part, found in (("chat template", tokenizer.chat_template), ("eos token", tokenizer.eos_token)):
        if not found:
            raise ConfigError(
                f"model = '{directory}': its tokenizer has no {part}, without which a turn has no beginning or "
                "end; take the tokenizer of the instruction-tuned sibling, or add one to tokenizer_config.json"
            )
    return tokenizer


def load_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, cfg: PromptsConfig) -> list[Prompt]:
    """Every prompt of the file, up to where the assistant's turn begins, in the order of the file.

    Raises:
        ConfigError: the file cannot be read, a row is not a prompt with an answer and a uid of its own, or
            (with on_long_prompt = "error") a prompt has more than max_prompt_tokens tokens.
    """
    rows = _read_rows(path, required=("prompt", "reward_model", "extra_info"))
    answers = [_answer(row) for row in rows]
    uids = _uids(rows)
    texts = [_render(tokenizer, row, _messages(row, "prompt", last=("user", "tool")), True) for row in rows]
    prompts = [
        Prompt(uid=uid, token_ids=ids, text=text, answer=answer)
        for uid, ids, text, answer in zip(uids, _tokenize(tokenizer, texts), texts, answers, strict=True)
    ]
    return _drop_long(prompts, path, cfg)


def _drop_long(prompts: list[Prompt], path: Path, cfg: PromptsConfig) -> list[Prompt]:
    long = [prompt for prompt in prompts if len(prompt.token_ids) > cfg.max_prompt_tokens]
    if not long:
        return prompts
    most = max(len(prompt.token_ids) for prompt in prompts)
    found = (
        f"prompts.max_prompt_tokens = {cfg.max_prompt_tokens}: prompt '{long[0].uid}' of '{path}' has "
        f"{len(long[0].token_ids)} tokens, {len(long)} of {len(prompts)} prompts are too long (longest: {most})"
    )
    if cfg.on_long_prompt == "error":
        raise ConfigError(f"{found}; raise it, or set prompts.on_long_prompt = 'skip'")
    if len(long) == len(prompts):
        raise ConfigError(f"{found}: none is left to train on; raise it")
    log.warning("%s; these are skipped", found)
    return [prompt for prompt in prompts if len(prompt.token_ids) <= cfg.max_prompt_tokens]


def load_demonstrations(
    path: Path, tokenizer: PreTrainedTokenizerBase, cfg: SftDataConfig
) -> list[TrainSequence]:
    """Every demonstration of the file: the conversation up to the last turn, then that turn to be learned.

    A sequence ends with the end-of-turn token, at which the engine stops too: what a chat template writes
    after it (Qwen's writes a line break) is left out, because it would never be sampled.

    Raises:
        ConfigError: the file cannot be read, a row is no conversation that ends with an assistant's turn, the
            chat template renders the turn in a way that cannot be learned, or a row is longer than max_tokens.
    """
    rows = _read_rows(path, required=("messages",))
    chats = [_messages(row, "messages", last=("assistant",)) for row in rows]
    fronts = [_render(tokenizer, row, chat[:-1], True) for row, chat in zip(rows, chats, strict=True)]
    wholes = [_render(tokenizer, row, chat, False) for row, chat in zip(rows, chats, strict=True)]
    sequences = [
        _demonstration(row, tokenizer, front, whole)
        for row, front, whole in zip(
            rows, _tokenize(tokenizer, fronts), _tokenize(tokenizer, wholes), strict=True
        )
    ]
    long = [sequence for sequence in sequences if len(sequence.token_ids) > cfg.max_tokens]
    if long:
        most = max(len(sequence.token_ids) for sequence in long)
        raise ConfigError(
            f"data.max_tokens = {cfg.max_tokens}: {long[0].uid} has {len(long[0].token_ids)} tokens, {len(long)} of "
            f"{len(sequences)} demonstrations are too long (longest: {most}); raise it, or shorten those rows"
        )
    return sequences


def _demonstration(row: _Row, tokenizer: PreTrainedTokenizerBase, front: Ints, whole: Ints) -> TrainSequence:
    if not np.array_equal(whole[: len(front)], front):
        raise ConfigError(
            f"{row.where}: the chat template renders the conversation without its last turn as no prefix of the "
            "whole, so what is learned is not what is sampled; use a template that only appends"
        )
    end = tokenizer.eos_token_id
    response = whole[len(front) :]
    stops = np.flatnonzero(response == end)
    if len(stops) != 1:
        raise ConfigError(
            f"{row.where}: expected the end-of-turn token {tokenizer.eos_token!r} once in the last turn, found it "
            f"{len(stops)} times, because the engine stops at it; mend the row, or set eos_token in "
            "tokenizer_config.json to the token with which the chat template ends a turn"
        )
    rest = response[stops[0] + 1 :]
    if len(rest) and (tail := str(tokenizer.decode(rest))).strip():
        raise ConfigError(
            f"{row.where}: the chat template writes {tail!r} after the end-of-turn token, where the engine stops; "
            "use a template that ends a turn there"
        )
    size = len(front) + int(stops[0]) + 1
    return TrainSequence(uid=row.where, token_ids=whole[:size], num_prompt_tokens=len(front))


@dataclass(frozen=True)
class _Row:
    where: str
    """File name and row (from 0) or line (from 1), for error messages."""
    fields: Mapping[str, Any]


def _read_rows(path: Path, required: Sequence[str]) -> list[_Row]:
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl}
    if path.suffix not in readers:
        raise ConfigError(f"file = '{path}': expected a name that ends in {' or '.join(readers)}; convert it")
    if not path.is_file():
        raise ConfigError(f"file = '{path}': no such file; give the path of a parquet or jsonl file")
    rows = readers[path.suffix](path)
    if not rows:
        raise ConfigError(f"file = '{path}': expected at least one row, found none; give a file with rows")
    for row in rows:
        for column in required:
            _field(row, row.fields, column)
    return rows


def _read_parquet(path: Path) -> list[_Row]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as err:
        raise ConfigError(f"file = '{path}': expected parquet, but {err}; write it again") from err
    return [_Row(f"{path.name} row {i}", fields) for i, fields in enumerate(table.to_pylist())]


def _read_jsonl(path: Path) -> list[_Row]:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as err:  # no JSON, or no UTF-8
            raise ConfigError(
                f"file = '{path}', line {number}: expected one JSON object, but {err}; mend it"
            ) from None
        if not isinstance(fields, dict):
            raise ConfigError(
                f"file = '{path}', line {number}: expected one JSON object, not {line[:40]!r}; mend it"
            )
        rows.append(_Row(f"{path.name} line {number}", fields))
    return rows


def _field(row: _Row, holder: Any, name: str, parent: str = "") -> Any:
    """holder[name], or an error that names what is there instead."""
    dotted = f"{parent}.{name}" if parent else name
    if not isinstance(holder, Mapping):
        raise ConfigError(
            f"{row.where}: '{parent}' = {_short(holder)}: expected a table with '{name}'; add it"
        )
    if holder.get(name) is not None:
        return holder[name]
    present = [key for key, value in holder.items() if value is not None]
    near = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
    hint = f"rename '{near[0]}'" if near else "add it"
    raise ConfigError(f"{row.where}: missing '{dotted}', found {', '.join(present) or 'nothing'}; {hint}")


def _messages(row: _Row, column: str, last: tuple[str, ...]) -> list[dict[str, Any]]:
    """The chat in `column`, which must end with a turn of one of the roles `last`."""
    chat = row.fields[column]
    if not isinstance(chat, list) or not all(isinstance(message, Mapping) for message in chat):
        raise ConfigError(
            f"{row.where}: '{column}' = {_short(chat)}: expected a list of {{role, content}}; convert it"
        )
    if not chat:
        raise ConfigError(f"{row.where}: '{column}' = []: expected at least one message; remove the row")
    for i, message in enumerate(chat):
        role, content = (_field(row, message, key, f"{column}[{i}]") for key in ("role", "content"))
        if role not in ROLES:
            raise ConfigError(
                f"{row.where}: '{column}[{i}].role' = {role!r}: expected one of {ROLES}; rename it"
            )
        if not isinstance(content, str) or not content.strip():
            raise ConfigError(
                f"{row.where}: '{column}[{i}].content' = {_short(content)}: expected a text; fill it"
            )
    if chat[-1]["role"] not in last:
        raise ConfigError(
            f"{row.where}: '{column}' ends with role {chat[-1]['role']!r}: expected {' or '.join(last)}; "
            "mend the last message"
        )
    return [{key: value for key, value in message.items() if value is not None} for message in chat]


def _answer(row: _Row) -> str:
    answer = _field(row, row.fields["reward_model"], "ground_truth", "reward_model")
    if isinstance(answer, bool) or not isinstance(answer, str | int) or not str(answer).strip():
        raise ConfigError(
            f"{row.where}: 'reward_model.ground_truth' = {_short(answer)}: expected the answer as a text, "
            "without one no response can be verified; fill it, or remove the row"
        )
    return str(answer)


def _uids(rows: Sequence[_Row]) -> list[str]:
    first: dict[str, str] = {}
    for row in rows:
        uid = str(_field(row, row.fields["extra_info"], "index", "extra_info"))
        if uid in first:
            raise ConfigError(
                f"uid '{uid}': {first[uid]} and {row.where} both have it, expected one row each, because a prompt is "
                "trained once per epoch; keep one of them (some published files repeat every row)"
            )
        first[uid] = row.where
    return list(first)


def _render(
    tokenizer: PreTrainedTokenizerBase, row: _Row, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as err:
        raise ConfigError(
            f"{row.where}: the chat template refuses it: {err}; mend the row's messages"
        ) from err
    return str(text)


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Ints]:
    # The template has written every special token: the tokenizer must add none of its own.
    return [np.asarray(ids, np.int32) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
