"""Conversations: turns joined to one response, to the token, whoever answers slowly, wrongly or not at all."""

import asyncio
import logging
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from megatron_vespo.data.conversation import Conversations, append_turn
from megatron_vespo.data.environments import Calculator
from megatron_vespo.types import (
    Ints,
    Prompt,
    Response,
    RunError,
    Sampling,
    Scored,
    TrainSequence,
    VersionSpan,
)
from tests.data.test_environments import CHATML, merging_tokenizer, rendered

SAMPLING = Sampling(temperature=0.7, max_tokens=200)


def ints(*values: int) -> Ints:
    return np.asarray(values, np.int32)


def one_turn(
    context: int, ids: Sequence[int], version: int, text: str = "", reason: str = "stop", **more: int
) -> Response:
    """A turn after `context` tokens, recognisable by its numbers: log-probs -version, experts (version, row)."""
    rows = context + len(ids) - 1
    return Response(
        token_ids=ints(*ids),
        text=text,
        behavior_logp=np.full(len(ids), -version, np.float32),
        spans=(VersionSpan(version=version, start=0, end=len(ids)),),
        experts=np.stack([np.full(rows, version), np.arange(rows)], axis=1).astype(np.int16)[:, None, :],
        finish_reason=reason,
        engine=f"e{version}",
        **more,
    )


def test_turns_are_joined_token_by_token():
    """Three prompt tokens; turns of 2, 3 and 1 tokens with replies of 2 and 1: worked out by hand."""
    whole = append_turn(
        one_turn(3, [10, 11], 5, num_resumed=1), ints(20, 21), one_turn(7, [12, 13, 14], 5, num_resumed=2)
    )
    whole = append_turn(whole, ints(22), one_turn(11, [15], 7, text="last", reason="length"))
    assert (
        whole.token_ids.tolist() == [10, 11, 20, 21, 12, 13, 14, 22, 15] and whole.token_ids.dtype == np.int32
    )
    assert whole.sampled is not None and whole.sampled.dtype == np.bool_
    assert whole.sampled.tolist() == [True, True, False, False, True, True, True, False, True]
    assert whole.behavior_logp.tolist() == [-5, -5, 0, 0, -5, -5, -5, 0, -7]
    assert whole.behavior_logp.dtype == np.float32
    assert whole.spans == (VersionSpan(version=5, start=0, end=8), VersionSpan(version=7, start=8, end=9))
    assert whole.versions.tolist() == [5] * 8 + [7]
    # Row p from the pass that read token p first: 3 + 9 - 1 rows, the first 4 of turn 1, of turn 3 only the last.
    assert whole.experts is not None and whole.experts.dtype == np.int16
    assert whole.experts[:, 0].tolist() == [[5, p] for p in range(9)] + [[7, 9], [7, 10]]
    assert (whole.text, whole.finish_reason, whole.engine) == ("last", "length", "e7")
    assert (whole.num_turns, whole.num_resumed) == (3, 3)


def test_a_turn_that_spans_a_weight_push_keeps_its_versions():
    first = one_turn(1, [10, 11], 4)
    turn = one_turn(4, [12, 13, 14], 6)
    spans = (VersionSpan(version=4, start=0, end=1), VersionSpan(version=6, start=1, end=3))
    turn = Response(**{**vars(turn), "spans": spans})
    assert append_turn(first, ints(20), turn).versions.tolist() == [4, 4, 4, 4, 6, 6]


def test_rows_of_experts_change_over_where_the_first_pass_ended():
    whole = append_turn(one_turn(2, [10, 11], 1), ints(20), one_turn(5, [12], 2))
    assert whole.experts is not None
    assert whole.experts[:, 0].tolist() == [
        [1, 0],
        [1, 1],
        [1, 2],
        [2, 3],
        [2, 4],
    ]  # the last sampled token was row 3
    bare = Response(**{**vars(one_turn(5, [12], 2)), "experts": None})
    assert append_turn(one_turn(2, [10, 11], 1), ints(20), bare).experts is None


class Scripted:
    """An engine that says `say(number of the turn, prompt)`, spelled by the tokenizer, the end-of-turn token after it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[int, Prompt], str]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.asked: list[tuple[list[int], int]] = []
        self.ends_before: int | None = None

    async def sample(self, prompt: Prompt, num: int, sampling: Sampling) -> tuple[Response, ...]:
        assert num == 1 and sampling.temperature == 0.7
        context = prompt.token_ids.tolist()
        self.asked.append((context, sampling.max_tokens))
        ends = context.count(self.tokenizer.eos_token_id)
        self.ends_before = ends if self.ends_before is None else self.ends_before
        turn = (ends - self.ends_before) // 2  # each turn of the assistant is followed by one of the user
        text = self.say(turn, prompt)
        ids = [*self.spell(text), self.tokenizer.eos_token_id][: sampling.max_tokens]
        reason = "stop" if ids[-1] == self.tokenizer.eos_token_id else "length"
        return (one_turn(len(context), ids, turn + 1, text, reason),)

    def spell(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    async def score(self, sequences: Sequence[TrainSequence]) -> tuple[Scored, ...]:
        return tuple(
            Scored(logp=np.zeros(s.num_response_tokens, np.float32), experts=None) for s in sequences
        )


QUESTION = [{"role": "user", "content": "How much is 12*7+1?"}]
SAID = ["I compute <calc>12*7</calc>", "and <calc>84+1</calc>", "85"]
CHAT = [
    *QUESTION,
    {"role": "assistant", "content": SAID[0]},
    {"role": "user", "content": "<result>84</result>"},
    {"role": "assistant", "content": SAID[1]},
    {"role": "user", "content": "<result>85</result>"},
    {"role": "assistant", "content": SAID[2]},
]


def asking(tokenizer: PreTrainedTokenizerBase, uid: str = "u") -> Prompt:
    return Prompt(uid=uid, token_ids=ints(*rendered(tokenizer, QUESTION, begin=True)), text="?", answer="85")


def hold(
    talks: Conversations, prompt: Prompt, sampling: Sampling = SAMPLING, num: int = 1
) -> tuple[Response, ...]:
    async def main() -> tuple[Response, ...]:
        async with asyncio.timeout(30):
            return await talks.sample(prompt, num, sampling)

    return asyncio.run(main())


@pytest.mark.parametrize("which", ["demo", "chatml"])
def test_the_calculator_from_end_to_end_is_spelled_as_the_template_spells_the_whole(tokenizer, which):
    if which == "chatml":
        tokenizer = merging_tokenizer(CHATML)
    engine, prompt = Scripted(tokenizer, lambda turn, _: SAID[turn]), asking(tokenizer)
    (whole,) = hold(Conversations(engine, Calculator(tokenizer), max_turns=8), prompt)
    ids = [*prompt.token_ids.tolist(), *whole.token_ids.tolist()]
    spelled = rendered(tokenizer, CHAT, begin=False)
    assert ids == spelled[: len(ids)]
    assert (
        str(tokenizer.decode(spelled[len(ids) :])).strip() == ""
    )  # what the template writes after the last turn
    assert whole.sampled is not None
    turns = [[*engine.spell(text), tokenizer.eos_token_id] for text in SAID]
    assert whole.token_ids[whole.sampled].tolist() == [token for turn in turns for token in turn]
    assert (whole.num_turns, whole.finish_reason, whole.text) == (3, "stop", "85")
    assert [span.version for span in whole.spans] == [1, 2, 3] and whole.spans[-1].end == len(whole.token_ids)
    assert whole.experts is not None and len(whole.experts) == len(ids) - 1
    for (context, left), before in zip(
        engine.asked, [0, *np.flatnonzero(np.diff(whole.sampled.astype(int)) == 1) + 1], strict=True
    ):
        assert context == ids[: len(prompt.token_ids) + before] and left == SAMPLING.max_tokens - before


def test_what_was_sampled_is_never_tokenized_again():
    tokenizer = merging_tokenizer(CHATML)
    engine = Scripted(tokenizer, lambda turn, _: "<calc>6*7</calc>" if turn == 0 else "42")
    tokenizer_spelling = engine.spell
    engine.spell = lambda text: [token for letter in text for token in tokenizer_spelling(letter)]
    (whole,) = hold(Conversations(engine, Calculator(tokenizer), max_turns=2), asking(tokenizer))
    odd = engine.spell("<calc>6*7</calc>")
    assert odd != tokenizer_spelling("<calc>6*7</calc>")  # the tokenizer would have merged letters
    assert engine.asked[1][0][-len(whole.token_ids) :][:0] == []
    assert whole.token_ids[: len(odd)].tolist() == odd
    assert engine.asked[1][0][len(engine.asked[0][0]) :][: len(odd)] == odd


def test_one_turn_without_a_call_is_the_engines_own_response(tokenizer):
    (whole,) = hold(
        Conversations(Scripted(tokenizer, lambda *_: "85"), Calculator(tokenizer), max_turns=8),
        asking(tokenizer),
    )
    assert whole.num_turns == 1 and whole.sampled is None and whole.text == "85"


def test_a_conversation_ends_at_its_number_of_turns(tokenizer):
    engine = Scripted(tokenizer, lambda *_: "<calc>1</calc>")
    (whole,) = hold(Conversations(engine, Calculator(tokenizer), max_turns=3), asking(tokenizer))
    assert whole.num_turns == len(engine.asked) == 3 and whole.finish_reason == "stop"


def test_all_tokens_together_never_exceed_the_limit(tokenizer):
    """<calc>1</calc> and its end are 15 tokens; <|user|><result>1</result><|end|><|assistant|> are 21."""
    engine = Scripted(tokenizer, lambda *_: "<calc>1</calc>")
    talks, turn, reply = Conversations(engine, Calculator(tokenizer), max_turns=9), 15, 21
    for limit in range(1, 100):
        (whole,) = hold(talks, asking(tokenizer), Sampling(temperature=0.7, max_tokens=limit))
        full, rest = divmod(limit, turn + reply)
        assert whole.finish_reason == "length"
        # cut in the middle of a turn, or ended after a whole one for want of room for a reply and one more token
        assert len(whole.token_ids) == full * (turn + reply) + min(rest, turn) - (reply if rest == 0 else 0)
        assert whole.num_turns == full + (rest > 0) and len(whole.token_ids) <= limit


def test_conversations_of_one_prompt_do_not_wait_for_each_other(tokenizer):
    class Slow(Calculator):
        waiting = 0

        async def reply(self, prompt: Prompt, response: Response) -> Ints | None:
            Slow.waiting += 1
            async with asyncio.timeout(10):
                while Slow.waiting < 5:  # until all five are here at once
                    await asyncio.sleep(0)
            return await super().reply(prompt, response)

    engine = Scripted(tokenizer, lambda turn, _: SAID[turn])
    responses = hold(Conversations(engine, Slow(tokenizer), max_turns=8), asking(tokenizer), num=5)
    assert [response.num_turns for response in responses] == [3] * 5


class Bad:
    """Replies as it is told to."""

    def __init__(self, reply: Callable[[], Ints | None]) -> None:
        self._reply = reply

    async def reply(self, prompt: Prompt, response: Response) -> Ints | None:
        return self._reply()


def raising() -> Ints | None:
    raise KeyError("no tool")


@pytest.mark.parametrize(
    "reply",
    [
        raising,
        lambda: ints(),
        lambda: np.zeros((2, 2), np.int32),
        lambda: np.ones(2),
        lambda: ints(-1),
        lambda: "a",
    ],
)
def test_an_environment_that_raises_or_returns_no_token_ids_ends_the_conversation_and_is_counted(
    tokenizer, caplog, reply
):
    talks = Conversations(Scripted(tokenizer, lambda *_: "hm"), Bad(reply), max_turns=8)
    first, second = hold(talks, asking(tokenizer), num=2)
    assert first.num_turns == second.num_turns == 1 and first.finish_reason == "stop"
    assert talks.failures == {"timeouts": 0, "errors": 2}
    assert "the environment Bad failed" in caplog.text and caplog.text.count("Traceback") == 1


def test_an_environment_that_hangs_ends_the_conversation_at_its_deadline(tokenizer):
    class Hanging:
        async def reply(self, prompt: Prompt, response: Response) -> Ints | None:
            await asyncio.Event().wait()

    talks = Conversations(Scripted(tokenizer, lambda *_: "hm"), Hanging(), max_turns=8, reply_timeout_s=0.05)
    (whole,) = hold(talks, asking(tokenizer))
    assert whole.num_turns == 1 and talks.failures == {"timeouts": 1, "errors": 0}


def test_an_environment_that_fails_everybody_stops_the_run(tokenizer, caplog):
    caplog.set_level(logging.ERROR)
    replies = [raising] * 15 + [lambda: None] + [raising] * 16
    talks = Conversations(Scripted(tokenizer, lambda *_: "hm"), Bad(lambda: replies.pop(0)()), max_turns=2)
    for _ in range(31):
        hold(talks, asking(tokenizer))
    with pytest.raises(RunError, match=r"(?s)environment Bad = 16 failures in a row: .*KeyError: 'no tool'"):
        hold(talks, asking(tokenizer))


def test_an_engine_that_fails_in_one_conversation_ends_the_others(tokenizer):
    class Failing(Scripted):
        async def sample(self, prompt: Prompt, num: int, sampling: Sampling) -> tuple[Response, ...]:
            if len(self.asked) == 2:
                raise RunError("engine = gone")
            self.asked.append(([], 0))
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.asked.append(([], 1))
                raise
            raise AssertionError

    engine = Failing(tokenizer, lambda *_: "hm")
    with pytest.raises(RunError, match="engine = gone"):
        hold(Conversations(engine, Calculator(tokenizer), max_turns=8), asking(tokenizer), num=3)
    assert [cancelled for _, cancelled in engine.asked] == [0, 0, 1, 1]


def test_scoring_is_the_engines(tokenizer):
    talks = Conversations(Scripted(tokenizer, lambda *_: ""), Calculator(tokenizer), max_turns=8)
    sequence = TrainSequence(uid="u", token_ids=ints(1, 2, 3), num_prompt_tokens=1)
    assert [len(scored.logp) for scored in asyncio.run(talks.score([sequence]))] == [2]
