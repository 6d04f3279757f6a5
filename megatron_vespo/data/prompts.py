"""Prompts and demonstrations: rows, read with the model's chat template into token ids.

What a row lacks is found here, before any process starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_vespo.config import ConfigError, PromptsConfig, SftDataConfig
from megatron_vespo.data.rows import Row, read_rows, short
from megatron_vespo.types import Ints, Prompt, TrainSequence

log = logging.getLogger(__name__)

TOKENIZER_BATCH = 1024
ROLES = ("system", "user", "assistant", "tool")


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
    """Every prompt of a file or dataset, up to where the assistant's turn begins, in the order of its rows.

    Raises:
        ConfigError: it cannot be read, a row is not a prompt with an answer and a uid of its own, or
            (with on_long_prompt = "error") a prompt has more than max_prompt_tokens tokens.
    """
    settings = ("prompt_column", "answer_column", "uid_column")
    columns = {column: f"prompts.{name}" for name in settings if (column := getattr(cfg, name))}
    rows = read_rows(path, columns, cfg.split)
    answers = [_answer(row, cfg.answer_column) for row in rows]
    uids = _uids(rows, cfg.uid_column)
    texts = [_render(tokenizer, row, _prompt(row, cfg.prompt_column), True) for row in rows]
    prompts = [
        Prompt(uid=uid, token_ids=ids, text=text, answer=answer)
        for uid, ids, text, answer in zip(uids, _tokenize(tokenizer, texts), texts, answers, strict=True)
    ]
    return _drop_long(prompts, path, cfg)


def load_questions(path: Path, tokenizer: PreTrainedTokenizerBase, split: str = "train") -> list[Prompt]:
    """Every chat of a file or dataset, up to where the assistant's turn begins; no answers, and uids are row numbers.

    The chat stands in a column "prompt" or "messages"; a last turn of the assistant is left out.

    Raises:
        ConfigError: it cannot be read, or a row holds no chat.
    """
    try:
        rows, column = read_rows(path, {"messages": ""}, split), "messages"
    except ConfigError:
        rows, column = read_rows(path, {"prompt": ""}, split), "prompt"
    texts = [_render(tokenizer, row, _question(row, column), True) for row in rows]
    return [
        Prompt(uid=str(i), token_ids=ids, text=text, answer="")
        for i, (ids, text) in enumerate(zip(_tokenize(tokenizer, texts), texts, strict=True))
    ]


def _question(row: Row, column: str) -> list[dict[str, Any]]:
    """The chat that asks, without an answer that follows."""
    chat = row.get(column)
    if isinstance(chat, list) and len(chat) > 1 and Row(row.where, chat[-1]).get("role") == "assistant":
        row = Row(row.where, {column: chat[:-1]})
    return _prompt(row, column)


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
    """Every demonstration of a file or dataset: the conversation up to the last turn, then that turn to be learned.

    A sequence ends with the end-of-turn token, at which the engine stops too: what a chat template writes
    after it (Qwen's writes a line break) is left out, because it would never be sampled.

    Raises:
        ConfigError: the file cannot be read, a row is no conversation that ends with an assistant's turn, the
            chat template renders the turn in a way that cannot be learned, or a row is longer than max_tokens.
    """
    rows = read_rows(path, {"messages": ""})
    chats = [_messages(row, "messages", row.get("messages"), last=("assistant",)) for row in rows]
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


def _demonstration(row: Row, tokenizer: PreTrainedTokenizerBase, front: Ints, whole: Ints) -> TrainSequence:
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


def _prompt(row: Row, column: str) -> list[dict[str, Any]]:
    """The chat that asks; a bare text is what the user says."""
    asked = row.get(column)
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    return _messages(row, column, asked, last=("user", "tool"))


def _messages(row: Row, column: str, chat: Any, last: tuple[str, ...]) -> list[dict[str, Any]]:
    """The chat found in `column`, which must end with a turn of one of the roles `last`."""
    if not isinstance(chat, list) or not all(isinstance(message, Mapping) for message in chat):
        raise ConfigError(
            f"{row.where}: '{column}' = {short(chat)}: expected a list of {{role, content}}; convert it"
        )
    if not chat:
        raise ConfigError(f"{row.where}: '{column}' = []: expected at least one message; remove the row")
    for i, message in enumerate(chat):
        role, content = (Row(f"{row.where}: {column}[{i}]", message).get(key) for key in ("role", "content"))
        if role not in ROLES:
            raise ConfigError(
                f"{row.where}: '{column}[{i}].role' = {role!r}: expected one of {ROLES}; rename it"
            )
        if not isinstance(content, str) or not content.strip():
            raise ConfigError(
                f"{row.where}: '{column}[{i}].content' = {short(content)}: expected a text; fill it"
            )
    if chat[-1]["role"] not in last:
        raise ConfigError(
            f"{row.where}: '{column}' ends with role {chat[-1]['role']!r}: expected {' or '.join(last)}; "
            "mend the last message"
        )
    return [{key: value for key, value in message.items() if value is not None} for message in chat]


def _answer(row: Row, column: str) -> str:
    answer = row.get(column)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ConfigError(
            f"{row.where}: '{column}' = {short(answer)}: expected the answer as a text, without one no response can be "
            "verified; fill it, or remove the row"
        )
    return str(answer)


def _uids(rows: Sequence[Row], column: str) -> list[str]:
    if not column:
        return [str(i) for i in range(len(rows))]
    first: dict[str, str] = {}
    for row in rows:
        uid = str(row.get(column))
        if uid in first:
            raise ConfigError(
                f"uid '{uid}': {first[uid]} and {row.where} both have it, expected one row each, because a prompt is "
                "trained once per epoch; keep one of them (some published files repeat every row), or number the rows "
                "with prompts.uid_column = ''"
            )
        first[uid] = row.where
    return list(first)


def _render(
    tokenizer: PreTrainedTokenizerBase, row: Row, messages: list[dict[str, Any]], add_generation_prompt: bool
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
    """Token ids of rendered chats, in batches: the tokenizer's own records of a batch take many times the ids."""
    sequences = []
    for start in range(0, len(texts), TOKENIZER_BATCH):
        # The template has written every special token: the tokenizer must add none of its own.
        batch = tokenizer(
            texts[start : start + TOKENIZER_BATCH], add_special_tokens=False, return_attention_mask=False
        )
        sequences += [np.asarray(ids, np.int32) for ids in batch["input_ids"]]
    return sequences
