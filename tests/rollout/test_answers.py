"""Answers of the engine are checked on arrival; canned answers, with what is impossible about each."""

from __future__ import annotations

import base64
import copy
import json

import numpy as np
import pytest

from megatron_vespo.rollout.answers import (
    NOTHING,
    Asked,
    parse_candidate,
    parse_json,
    parse_parts,
    parse_scored,
    version_of,
)
from megatron_vespo.rollout.failures import Unusable
from megatron_vespo.rollout.model import ModelFacts
from megatron_vespo.types import VersionSpan

FACTS = ModelFacts(
    vocab_size=264,
    max_positions=1024,
    num_layers=3,
    router_layers=(0, 2),
    num_experts=8,
    experts_per_token=2,
    stop_token_ids=(260,),
)
# 2 + 3 tokens: rows of 4 tokens, 3 layers of which the middle one is dense and sends zeros, 2 experts.
EXPERTS = np.array([[[p, p + 1], [0, 0], [7, p]] for p in range(4)], "<i4")


def encoded(experts) -> str:
    return base64.b64encode(np.ascontiguousarray(experts, "<i4").tobytes()).decode()


ANSWER = {
    "text": "ab",
    "output_ids": [65, 66, 260],
    "meta_info": {
        "prompt_tokens": 2,
        "finish_reason": {"type": "stop", "matched": 260},
        "weight_version": "4",
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}],
        "output_token_logprobs": [[-0.5, 65, None], [-1.5, 66, None], [-2.5, 260, None]],
        "routed_experts": encoded(EXPERTS),
    },
}


def changed(**meta):
    answer = copy.deepcopy(ANSWER)
    answer["meta_info"] |= meta
    return answer


def parse(answer, *, limit=3, record=True, first_row=0):
    asked = Asked(num_prefix=2, limit=limit, first_row=first_row)
    (part,) = parse_parts(json.dumps([answer]).encode(), [asked], FACTS, record)
    return part


def test_a_good_answer_becomes_a_part():
    part = parse(ANSWER)
    assert part.token_ids.tolist() == [65, 66, 260]
    assert part.logp.tolist() == [-0.5, -1.5, -2.5]
    assert part.spans == (VersionSpan(version=3, start=0, end=1), VersionSpan(version=4, start=1, end=3))
    assert part.finish_reason == "stop"
    assert part.text == "ab"
    assert part.experts.dtype == np.uint8
    assert part.experts.tolist() == [[[p, p + 1], [7, p]] for p in range(4)]
    assert parse(ANSWER, record=False).experts is None


def test_rows_begin_where_they_were_asked_for():
    part = parse(changed(routed_experts=encoded(EXPERTS[1:])), first_row=1)
    assert part.experts.tolist() == [[[p, p + 1], [7, p]] for p in range(1, 4)]
    with pytest.raises(Unusable, match=r"24 routed experts: expected \(3, 3, 2\)"):
        parse(ANSWER, first_row=1)


ABORT = {"type": "abort", "message": "Aborted"}


def test_an_interrupted_answer_keeps_what_it_has():
    answer = changed(finish_reason=ABORT, output_token_logprobs=[[-0.5, 65], [-1.5, 66], [-2.5, 67]])
    answer["output_ids"] = [65, 66, 67]
    part = parse(answer, limit=9)
    assert part.token_ids.tolist() == [65, 66, 67]
    assert part.finish_reason == "abort"


def test_an_interruption_hides_no_end():
    assert parse(changed(finish_reason=ABORT), limit=9).finish_reason == "stop"
    answer = changed(finish_reason=ABORT, output_token_logprobs=[[-0.5, 65], [-1.5, 66], [-2.5, 67]])
    answer["output_ids"] = [65, 66, 67]
    assert parse(answer, limit=3).finish_reason == "length"


@pytest.mark.parametrize("missing", ["weight_versions", "routed_experts"])
def test_interrupted_tokens_without_their_record_are_not_kept(missing):
    answer = changed(finish_reason=ABORT)
    del answer["meta_info"][missing]
    assert parse(answer, limit=9) is NOTHING


def test_an_answer_interrupted_in_the_queue_is_nothing():
    answer = {"text": "", "output_ids": [], "meta_info": {"id": "r", "finish_reason": ABORT}}
    assert parse(answer) is NOTHING


def test_an_empty_span_of_a_request_that_had_no_token_yet_is_dropped():
    spans = [{"version": "3", "start": 0, "end": 0}, {"version": "4", "start": 0, "end": 3}]
    assert parse(changed(weight_versions=spans)).spans == (VersionSpan(version=4, start=0, end=3),)


TWICE = EXPERTS.copy()
TWICE[2, 2] = 5
FAR = EXPERTS.copy()
FAR[0, 0, 0] = 8


@pytest.mark.parametrize(
    ("meta", "complaint"),
    [
        ({"prompt_tokens": 3}, "a prompt of 3 tokens: expected 2"),
        ({"output_token_logprobs": ANSWER["meta_info"]["output_token_logprobs"][:2]}, "2 log-probs: expected one for each of 3"),
        ({"output_token_logprobs": [[-1, 65], [-1, 67], [-1, 260]]}, "log-probs"),
        ({"output_token_logprobs": [[-1, 65], [float("nan"), 66], [-1, 260]]}, "expected JSON"),
        ({"output_token_logprobs": [[-1, 65], [None, 66], [-1, 260]]}, r"log-prob \[nan\] of token \[1\]"),
        ({"output_token_logprobs": [[-1, 65], [-1, 66], [0.5, 260]]}, r"log-prob \[0.5\] of token \[2\]"),
        ({"output_token_logprobs": [[-1], [-1], [-1]]}, r"expected \(log-prob, token id, text\)"),
        ({"output_token_logprobs": [["x", 65], [-1, 66], [-1, 260]]}, "no numbers"),
        ({"weight_versions": [{"version": "3"}]}, "expected version, start and end"),
        ({"output_token_logprobs": None}, "'output_token_logprobs' NoneType: expected a list"),
        ({"weight_versions": [{"version": "3", "start": 0, "end": 2}]}, "version spans .*: expected ascending, from 0 to 3"),
        ({"weight_versions": []}, "version spans"),
        ({"weight_versions": [{"version": "3", "start": 1, "end": 3}]}, "version spans"),
        ({"weight_versions": [{"version": "4", "start": 0, "end": 2}, {"version": "3", "start": 2, "end": 3}]}, "version spans"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 3}]}, "weight version 'default'"),
        ({"routed_experts": encoded(EXPERTS[:-1])}, r"18 routed experts: expected \(4, 3, 2\)"),
        ({"routed_experts": encoded(FAR)}, r"expert ids 0..8: expected 0..7"),
        ({"routed_experts": encoded(TWICE)}, r"one expert twice at \(token, layer\) \[\[2, 1\]\]"),
        ({"routed_experts": "?"}, "no base64"),
        ({"routed_experts": None}, "'routed_experts' NoneType"),
        ({"finish_reason": {"type": "stop", "matched": 66}, "extra": 0}, None),
        ({"finish_reason": {"type": "length", "length": 3}}, None),
        ({"finish_reason": {"type": "error"}}, "finish reason error after 3 tokens"),
    ],
)  # fmt: skip
def test_an_impossible_answer_is_refused(meta, complaint):
    if complaint is None:
        parse(changed(**meta))
    else:
        with pytest.raises(Unusable, match=complaint):
            parse(changed(**meta))


def test_a_response_that_the_engine_cut_short_is_refused():
    with pytest.raises(Unusable, match="finish reason length after 3 tokens: expected length at 5"):
        parse(changed(finish_reason={"type": "length", "length": 3}), limit=5)


def test_a_stop_without_an_end_of_turn_is_refused():
    answer = changed(output_token_logprobs=[[-0.5, 65], [-1.5, 66], [-2.5, 67]])
    answer["output_ids"] = [65, 66, 67]
    with pytest.raises(Unusable, match="stopped at token 67"):
        parse(answer)


@pytest.mark.parametrize("ids", [[], [65, 66, 264], [-1, 66, 260]])
def test_impossible_token_ids_are_refused(ids):
    answer = changed(output_token_logprobs=[[-1, i] for i in ids])
    answer["output_ids"] = ids
    with pytest.raises(Unusable, match="token ids"):
        parse(answer)


@pytest.mark.parametrize("ids", [[None, 6], ["a", 6], [[5], 6], [5.0, 6.0]])
def test_token_ids_that_are_no_whole_numbers_are_refused(ids):
    with pytest.raises(Unusable, match=r"token ids .* expected whole numbers"):
        parse(ANSWER | {"output_ids": ids})


@pytest.mark.parametrize("end", [None, "3", 3.5])
def test_version_spans_that_do_not_end_at_a_token_are_refused(end):
    spans = [{"version": "3", "start": 0, "end": end}]
    with pytest.raises(Unusable, match="expected version, start and end"):
        parse(changed(weight_versions=spans))


def test_what_sglang_does_not_say_of_a_request_in_its_queue_does_not_matter():
    """Without experts to record, what it sampled before it was retracted is complete."""
    answer = changed(finish_reason={"type": "abort", "message": "Aborted"})
    del answer["meta_info"]["prompt_tokens"]
    answer["output_ids"][-1] = answer["meta_info"]["output_token_logprobs"][-1][1] = 67
    part = parse(answer, limit=9, record=False)
    assert part.token_ids.tolist() == [65, 66, 67] and part.finish_reason == "abort"


def test_a_scored_sequence_has_the_logprobs_of_its_response():
    meta = {
        "input_token_logprobs": [[None, 1], [-9.0, 2], [-1.0, 3], [-2.0, 4]],
        "routed_experts": encoded(EXPERTS[:3]),
    }
    scored = parse_scored({"meta_info": meta}, [1, 2, 3, 4], 2, FACTS, True)
    assert scored.logp.tolist() == [-1.0, -2.0]
    assert scored.experts.shape == (3, 2, 2)
    with pytest.raises(Unusable, match="4 scored tokens: expected the 4 that were given"):
        parse_scored({"meta_info": meta}, [1, 2, 3, 5], 2, FACTS, True)


def test_a_candidate_has_the_logprob_of_its_token():
    answer = {"meta_info": {"output_token_ids_logprobs": [[[-1.25, 7, None]]], "weight_version": "4"}}
    assert parse_candidate(answer, 7) == -1.25
    assert version_of(answer) == 4
    with pytest.raises(Unusable, match="log-prob of token 7: expected of token 8"):
        parse_candidate(answer, 8)
    with pytest.raises(Unusable, match="expected one, with its log-prob"):
        parse_candidate({"meta_info": {"output_token_ids_logprobs": [[]]}}, 8)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [(b"<html>", "expected JSON"), (b"[{}]", "1 answers: expected 2"), (b"[1, 2]", "without fields")],
)
def test_what_is_no_answer_is_refused(body, complaint):
    with pytest.raises(Unusable, match=complaint):
        parse_json(body, 2)
