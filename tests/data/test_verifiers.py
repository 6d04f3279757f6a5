"""Verifiers: what counts as right, what a response that cannot be judged gets, and what a long one loses."""

import asyncio
import logging
from collections.abc import Iterator

import numpy as np
import pytest

from megatron_vespo.config import ConfigError, RewardConfig
from megatron_vespo.data.judges import Failure
from megatron_vespo.data.verifiers import TextVerifier, exact_match, make_verifier, punish_overlong
from megatron_vespo.types import Prompt, Response, RunError, VersionSpan


def prompt(answer: str, uid: str = "u") -> Prompt:
    return Prompt(uid=uid, token_ids=np.zeros(1, np.int32), text="<question>", answer=answer)


def response(text: str, finish_reason: str = "stop", num_tokens: int = 1) -> Response:
    return Response(
        token_ids=np.zeros(num_tokens, np.int32),
        text=text,
        behavior_logp=np.zeros(num_tokens, np.float32),
        spans=(VersionSpan(version=0, start=0, end=num_tokens),),
        experts=None,
        finish_reason=finish_reason,
    )


class Loop:
    """Runs one coroutine after the other in one event loop, in which a verifier lives."""

    def __init__(self, runner: asyncio.Runner, verifier: TextVerifier) -> None:
        self.runner, self.verifier = runner, verifier

    def score(self, answer: str, *texts: str) -> tuple[float, ...]:
        return self.runner.run(self.verifier.score(prompt(answer), [response(text) for text in texts]))


@pytest.fixture(scope="module")
def math() -> Iterator[Loop]:
    with asyncio.Runner() as runner:
        loop = Loop(runner, make_verifier(RewardConfig(timeout_s=20)))
        yield loop
        runner.run(loop.verifier.__aexit__(None, None, None))


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("34", "We add $30$ and $4$.\n\nAnswer: \\boxed{34}", 1.0),
        ("34", "Therefore, the final answer is $34$.", 1.0),
        ("34", "<think>35?</think> \\boxed{34}<|im_end|>", 1.0),
        ("34", "The final answer is $35$; no, \\boxed{34}", 1.0),
        ("34", "\\boxed{35}", 0.0),
        ("34", "\\boxed{34", 0.0),
        ("34", "", 0.0),
        ("34", "I do not know.", 0.0),
        ("7", "\\boxed{3} or \\boxed{7}", 0.0),
        ("-3", "\\boxed{-3}", 1.0),
        ("1000", "\\boxed{1,000}", 1.0),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1.0),
        ("\\frac{1}{2}", "\\[ x = \\boxed{\\dfrac{2}{4}} \\]", 1.0),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{3}}", 0.0),
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", 1.0),
        ("34", "\\boxed{34}\n{\"a\": \"b\"}\r\u2028 \ud800 \x00", 1.0),
    ],
)  # fmt: skip
def test_mathematical_rewards_of_real_looking_responses(math, answer, text, reward):
    assert math.score(answer, text) == (reward,)


def test_a_response_cut_by_its_length_is_scored_on_its_text(math):
    cut = [response("\\boxed{34} and more", "length"), response("\\boxed{3", "length")]
    assert math.runner.run(math.verifier.score(prompt("34"), cut)) == (1.0, 0.0)


def test_rewards_come_in_the_order_of_the_responses(math):
    texts = ["\\boxed{8}", "\\boxed{7}", "\\boxed{8}", "7", "\\boxed{7}"]
    assert math.score("7", *texts) == (0, 1, 0, 1, 1)
    assert math.score("7") == ()
    assert math.verifier.failures == {"timeouts": 0, "deaths": 0, "errors": 0}


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("so it is \\boxed{ 7 }.", "7", 1.0),
        ("\\boxed{8} or \\boxed{7}", "7", 1.0),
        ("\\boxed{7} or \\boxed{8}", "7", 0.0),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1.0),
        ("\\boxed{0.5}", "\\frac{1}{2}", 0.0),
        (" B\n", "B", 1.0),
        ("The answer is B", "B", 0.0),
        ("\\boxed{7", "7", 0.0),
        ("\\boxed{}", "", 1.0),
        ("", "7", 0.0),
    ],
)
def test_exact_match_compares_the_last_box_or_the_whole_text(text, answer, reward):
    assert exact_match(text, answer) == reward


class Script:
    """A judge that says what it was given, in order; and counts what it was asked."""

    failure_kinds = ("errors", "deaths")

    def __init__(self, *verdicts: float | Failure) -> None:
        self.verdicts = list(verdicts)
        self.asked: list[str] = []

    async def open(self) -> None: ...

    async def judge(self, prompt: Prompt, text: str) -> float | Failure:
        self.asked.append(text)
        return self.verdicts.pop(0)

    async def close(self) -> None: ...


def score(verifier: TextVerifier, *texts: str) -> tuple[float, ...]:
    return asyncio.run(verifier.score(prompt("7"), [response(text) for text in texts]))


def test_equal_texts_are_judged_once():
    judge = Script(1.0, 0.25)
    assert score(TextVerifier(judge, 0.0), "a", "b", "a") == (1.0, 0.25, 1.0)
    assert judge.asked == ["a", "b"]


def test_what_cannot_be_judged_gets_the_stated_reward_and_is_counted_and_told_once_in_full(caplog):
    verifier = TextVerifier(
        Script(Failure("errors", "Traceback: one"), 1.0, Failure("errors", "Traceback: two")), -0.5
    )
    with caplog.at_level(logging.INFO):
        assert score(verifier, "a", "b", "c") == (-0.5, 1.0, -0.5)
    assert verifier.failures == {"errors": 2, "deaths": 0}
    assert "Traceback: one" in caplog.text and "Traceback: two" not in caplog.text
    assert "worth -0.5 (errors so far: 2)" in caplog.text


def test_a_judge_of_which_everything_dies_stops_the_run_and_one_that_raises_does_not():
    deaths, error = [Failure("deaths", "the worker died")] * 15, Failure("errors", "Traceback")
    spared = TextVerifier(Script(*deaths, 0.0, *deaths, error, *deaths, *[error] * 50), 0.0)
    assert score(spared, *map(str, range(97))) == (0.0,) * 97
    with pytest.raises(RunError, match=r"verifier deaths = 16 in a row: .*the worker died"):
        score(TextVerifier(Script(*deaths, *deaths), 0.0), *map(str, range(30)))


def test_the_overlong_punishment_grows_linearly_over_the_last_tokens():
    """DAPO, equation 13, with L_max = 100 and L_cache = 20; worked out by hand for a penalty of 0.5."""
    cfg = RewardConfig(verifier="exact_match", overlong_tokens=20, overlong_penalty=0.5)
    verifier = make_verifier(cfg)
    punished = punish_overlong(verifier, cfg, max_response_tokens=100)
    lengths = {1: 1.0, 80: 1.0, 81: 0.975, 90: 0.75, 99: 0.525, 100: 0.5}
    responses = [response("7", num_tokens=length) for length in lengths]
    assert asyncio.run(punished.score(prompt("7"), responses)) == pytest.approx(tuple(lengths.values()))
    assert asyncio.run(punished.score(prompt("7"), [response("8", num_tokens=100)])) == (-0.5,)
    assert asyncio.run(verifier.score(prompt("7"), responses)) == (1.0,) * 6  # as evaluation sees it
    assert punished.failures is verifier.failures
    assert punish_overlong(verifier, RewardConfig(), 100) is verifier


@pytest.mark.parametrize("url", ["localhost:80/judge", "ftp://x/y", "http:///judge"])
def test_an_address_that_is_none_is_refused_before_anything_starts(url):
    with pytest.raises(ConfigError, match="expected an address like"):
        make_verifier(RewardConfig(verifier="http", url=url))


def test_a_closed_verifier_scores_nothing():
    async def main() -> None:
        async with make_verifier(RewardConfig(verifier="exact_match")) as verifier:
            assert await verifier.score(prompt("7"), [response("7")]) == (1.0,)
        with pytest.raises(RunError, match="verifier = closed"):
            await verifier.score(prompt("7"), [response("7")])

    asyncio.run(main())
