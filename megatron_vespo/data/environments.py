"""The other side of conversations of several turns: what a person names, what a chat template makes of it, an example."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_vespo.config import ConfigError, EnvironmentConfig
from megatron_vespo.data.named import load_named
from megatron_vespo.types import Environment, Ints, Prompt, Response

SETTING = "environment.name"


def make_environment(cfg: EnvironmentConfig, tokenizer: PreTrainedTokenizerBase) -> Environment | None:
    """The configured environment, constructed with the tokenizer; None where a response is one turn.

    It lives in this process: what takes long there must be awaited.

    Raises:
        ConfigError: it cannot be imported or constructed, or is no Environment.
    """
    if cfg.name is None:
        return None
    kind = ENVIRONMENTS.get(cfg.name) or load_named(cfg.name, SETTING)
    try:
        environment = kind(tokenizer)
    except Exception as err:
        raise ConfigError(
            f"{SETTING} = '{cfg.name}': expected a class that is constructed with the tokenizer, but "
            f"{type(err).__name__}: {err}; mend it"
        ) from err
    if not callable(getattr(environment, "reply", None)):
        raise ConfigError(
            f"{SETTING} = '{cfg.name}': has no method `reply(prompt, response)`; see types.Environment, and add it"
        )
    return environment


def between_turns(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> Ints:
    """What the chat template writes from the end of one turn of the assistant to the beginning of its next.

    That is: whatever follows the end-of-turn token, which was sampled; then `messages`; then the opening of the
    assistant's turn.  Only this is tokenized, never what was sampled.

    Args:
        messages: {role, content}, of the roles that the template knows.

    Raises:
        ConfigError: the template refuses the messages, or does not end the assistant's turn with the end-of-turn token.
    """
    # A turn of ours stands for the sampled one.  Where it ends is looked up in the *same* rendering, because templates
    # write an assistant's turn in other ways once another follows (Qwen3 takes the thoughts out of it).
    turn = "[the turn that was sampled]"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": turn}, *messages]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError as err:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"chat template: refuses messages of the roles {roles} after the assistant's turn: {err}; use other roles"
        ) from err
    _, _, rest = text.partition(turn)
    # Tokenized from the end-of-turn token on, so that it is spelled as in the whole conversation.
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    if text.count(turn) != 1 or not ids or ids[0] != tokenizer.eos_token_id:
        raise ConfigError(
            f"chat template: expected {tokenizer.eos_token!r} right after the assistant's turn, found {rest[:40]!r}, because "
            "the engine stops there; set eos_token in tokenizer_config.json to the token that ends a turn"
        )
    return np.asarray(ids[1:], np.int32)


class Calculator:
    """Answers every <calc>12*7</calc> of a turn with <result>84</result>, as the user; ends when there is none.

    Numbers are exact fractions, shown as integers or with 12 digits.  Grammar: numbers, parentheses, + - * / // % **.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    async def reply(self, prompt: Prompt, response: Response) -> Ints | None:
        """The results, one a line; None without a call."""
        calls = CALL.findall(response.text)[:MAX_CALLS]
        if not calls:
            return None
        content = "\n".join(f"<result>{calculate(call)}</result>" for call in calls)
        return between_turns(self._tokenizer, [{"role": "user", "content": content}])


ENVIRONMENTS: Mapping[str, Callable[[PreTrainedTokenizerBase], Environment]] = {"calculator": Calculator}

CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
MAX_CALLS = 8
"""In one turn; further ones are not answered."""
MAX_CHARACTERS = 200
MAX_EXPONENT = 64
MAX_NUMBER = 10**30
"""Of every intermediate result's numerator and denominator: whatever is asked is answered in microseconds."""

BINARY: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, or "error: ..." in words that a model may learn from."""
    if len(expression) > MAX_CHARACTERS:
        return f"error: longer than {MAX_CHARACTERS} characters"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError as err:
        return f"error: {err}"
    except (
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    ):  # the last two: Python's parser, of many brackets
        return "error: not an arithmetic expression"
    return str(value) if value.denominator == 1 else format(float(value), ".12g")


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = Fraction(str(number))  # as it is written: 0.1 is a tenth
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            value = _value(operand) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            value = _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            value = Fraction(BINARY[type(op)](_value(left), _value(right)))
        case _:
            raise ValueError("not in the grammar")
    if max(abs(value.numerator), value.denominator) > MAX_NUMBER:
        raise OverflowError("a number is too large")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
        raise OverflowError(f"an exponent is no integer up to {MAX_EXPONENT}")
    return Fraction(base ** int(exponent))
