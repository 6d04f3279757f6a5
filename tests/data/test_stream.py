"""The prompt stream and its ledger: every item exactly once per epoch, whatever happens in between."""

import json
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.config import ConfigError
from megatron_vespo.data.stream import EpochStream, Kind, Ledger
from megatron_vespo.types import RunError


def stream_of(
    size: int, seed: int = 0, shuffle: bool = True, ledger: Ledger | None = None
) -> EpochStream[int]:
    return EpochStream(range(size), seed, shuffle, ledger or Ledger(size))


def reloaded(ledger: Ledger) -> Ledger:
    return Ledger.from_state(json.loads(json.dumps(ledger.state())))


class Run:
    """A run on a stream, and what it believes about it; both go back when it resumes from a checkpoint."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self.new = lambda ledger: EpochStream(range(size), seed, shuffle, ledger)
        self.stream = self.new(Ledger(size))
        self.under_way: list[int] = []
        self.ended: dict[int, Kind] = {}
        self.checkpoints: list[tuple[str, dict[int, Kind]]] = []
        self.checkpoint()

    def issue(self) -> tuple[int, int]:
        ordinal, item = self.stream.issue()
        assert ordinal not in self.ended and ordinal not in self.under_way
        self.under_way.append(ordinal)
        return ordinal, item

    def end(self, place: int, kind: Kind | None) -> None:
        ordinal = self.under_way.pop(place)
        if kind is None:
            self.stream.give_back(ordinal)
        else:
            self.ended[ordinal] = kind
            self.stream.done([ordinal], kind)

    def checkpoint(self) -> None:
        self.checkpoints.append((json.dumps(self.stream.ledger.state()), dict(self.ended)))

    def resume(self, state: str, ended: dict[int, Kind]) -> None:
        self.stream, self.ended, self.under_way = (
            self.new(Ledger.from_state(json.loads(state))),
            dict(ended),
            [],
        )


@settings(deadline=None)
@given(data=st.data(), size=st.integers(1, 7), seed=st.integers(0, 2**32), shuffle=st.booleans())
def test_whatever_happens_every_item_is_done_exactly_once_per_epoch(data, size, seed, shuffle):
    """Issue, end, give back, checkpoint, resume from any checkpoint, in any order; then finish three epochs."""
    order = stream_of(size, seed, shuffle).take(60 + 3 * size)[1]
    run = Run(size, seed, shuffle)
    for action in data.draw(st.lists(st.sampled_from("iiiitt" + "fgcr"), max_size=60)):
        if action == "i":
            ordinal, item = run.issue()
            assert item == order[ordinal]
        elif action == "c":
            run.checkpoint()
        elif action == "r":
            run.resume(*data.draw(st.sampled_from(run.checkpoints)))
        elif run.under_way:
            kinds: dict[str, Kind | None] = {"t": "trained", "f": "filtered", "g": None}
            run.end(data.draw(st.integers(0, len(run.under_way) - 1)), kinds[action])
        assert run.stream.num_under_way == len(run.under_way)
    last = max([3 * size, *(ordinal + 1 for ordinal in run.ended)])
    while run.stream.ledger.frontier < last:
        run.issue() if not run.under_way else run.end(0, "trained")
    assert sorted(run.ended)[:last] == list(range(last))
    for epoch in range(3):
        visits = [run.ended[ordinal] for ordinal in range(epoch * size, (epoch + 1) * size)]
        for kind in get_args(Kind):
            assert run.stream.ledger.count(kind, epoch) == visits.count(kind)


@settings(deadline=None)
@given(size=st.integers(1, 20), seed=st.integers(0, 2**32), shuffle=st.booleans())
def test_every_item_comes_exactly_once_per_epoch(size, seed, shuffle):
    stream = stream_of(size, seed, shuffle)
    for epoch in range(4):
        ordinals, items = stream.take(size)
        assert sorted(items) == list(range(size))
        assert ordinals == list(range(epoch * size, (epoch + 1) * size))


@settings(deadline=None)
@given(size=st.integers(1, 20), seed=st.integers(0, 2**32), start=st.integers(0, 70), num=st.integers(0, 50))
def test_a_stream_resumed_from_a_mere_count_continues_the_uninterrupted_one(size, seed, start, num):
    whole = stream_of(size, seed).take(start + num)[1]
    resumed = stream_of(size, seed, ledger=Ledger(size, frontier=start))
    assert resumed.take(num)[1] == whole[start:]


def test_epochs_and_seeds_have_orders_of_their_own_and_no_shuffle_keeps_the_file():
    stream = stream_of(100)
    first, second = stream.take(100)[1], stream.take(100)[1]
    assert first != second
    assert first != stream_of(100, seed=1).take(100)[1]
    assert stream_of(3, shuffle=False).take(5) == ([0, 1, 2, 3, 4], [0, 1, 2, 0, 1])
    assert stream.item(0) == first[0] and stream.item(199) == second[-1]


def test_what_is_given_back_comes_before_what_is_new_oldest_first():
    stream = stream_of(10)
    _, items = stream.take(6)
    for ordinal in (4, 2, 3):
        stream.give_back(ordinal)
    assert stream.take(4) == ([2, 3, 4, 6], [items[2], items[3], items[4], stream.item(6)])


def test_the_state_is_the_frontier_and_the_few_above_it():
    stream = stream_of(4)
    stream.take(8)
    stream.done([0, 1, 5], "trained")
    stream.done([3, 7], "filtered")
    state = {"size": 4, "frontier": 2, "done": [3, 5, 7], "trained": [2, 1], "filtered": [1, 1]}
    assert stream.ledger.state() == state == reloaded(stream.ledger).state()
    resumed = stream_of(4, ledger=reloaded(stream.ledger))
    assert resumed.take(5)[0] == [2, 4, 6, 8, 9]  # what was under way is issued again
    resumed.done([2], "trained")
    assert resumed.ledger.frontier == 4 and resumed.ledger.count("trained") == 4


def test_the_report_says_in_words_how_far_every_open_epoch_is():
    stream = stream_of(4)
    assert stream.report() == "epoch 1: 0 of 4 trained once, 0 filtered, 0 under way"
    stream.take(7)
    stream.done([0, 1, 4], "trained")
    stream.done([2], "filtered")
    assert stream.report() == (
        "epoch 1: 2 of 4 trained once, 1 filtered, 1 under way; epoch 2: 1 of 4 trained once, 0 filtered, 2 under way"
    )
    stream.done([3], "trained")
    assert stream.report() == "epoch 2: 1 of 4 trained once, 0 filtered, 2 under way"


def test_nothing_is_done_twice_and_an_error_changes_nothing():
    stream = stream_of(4)
    stream.take(4)
    stream.done([0, 2], "trained")
    before = stream.ledger.state()
    for wrong, words in [
        (
            lambda: stream.done([1, 2], "trained"),
            r"ordinals = \[2\]: expected ones under way, these are done",
        ),
        (lambda: stream.done([1, 1], "filtered"), r"ordinals = \[1\]: done twice, expected once"),
        (lambda: stream.done([1, 9], "trained"), r"ordinals = \[9\]: .* these are not issued"),
        (lambda: stream.give_back(0), r"ordinals = \[0\]: .* these are done"),
        (lambda: stream.ledger.done([1, 0], "trained"), r"ordinals = \[0\]: done twice"),
    ]:
        with pytest.raises(RunError, match=words):
            wrong()
        assert stream.ledger.state() == before and stream.num_under_way == 2


def test_a_stream_of_nothing_or_of_other_data_is_refused():
    with pytest.raises(ConfigError, match="expected at least one"):
        stream_of(0)
    with pytest.raises(ConfigError, match="items = 3: the run so far counted 4 in an epoch"):
        stream_of(3, ledger=Ledger(4))
