"""The life of an engine: which edges there are, and above all which there are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.rollout.lifecycle import EDGES, Life, Pulse, State

MOVES = {
    "answers": lambda life: life.answers(),
    "confirm": lambda life: life.confirm(1),
    "outdate": lambda life: life.outdate(),
    "lose": lambda life: life.lose(),
    "restart": lambda life: life.restart(),
    "drain": lambda life: life.drain(),
    "end": lambda life: life.end(),
}
PATHS = {
    State.STARTING: [],
    State.STALE: ["answers"],
    State.SERVING: ["answers", "confirm"],
    State.DRAINING: ["answers", "drain"],
    State.LOST: ["lose"],
    State.GONE: ["end"],
}


def living(state):
    life = Life(2)
    for move in PATHS[state]:
        MOVES[move](life)
    assert life.state is state
    return life


@pytest.mark.parametrize(
    ("state", "move"),
    [
        (State.STARTING, "confirm"),  # nobody serves before it answers, and was pushed to
        (State.LOST, "confirm"),
        (State.LOST, "answers"),
        (State.GONE, "restart"),
        (State.GONE, "confirm"),
        (State.DRAINING, "confirm"),
        (State.DRAINING, "outdate"),
        (State.STALE, "restart"),
        (State.SERVING, "restart"),
        (State.SERVING, "end"),
    ],
)
def test_there_is_no_such_edge(state, move):
    with pytest.raises(ValueError, match="no such edge"):
        MOVES[move](living(state))


@given(st.lists(st.sampled_from(sorted(MOVES))))
def test_whatever_happens_to_it_an_engine_serves_only_when_confirmed_since_its_last_start(moves):
    life, confirmed = Life(2), False
    for move in moves:
        try:
            MOVES[move](life)
        except ValueError:
            continue
        confirmed = (confirmed or move == "confirm") and move not in ("lose", "restart")
        assert life.state is not State.SERVING or confirmed
        assert (life.version is None) is (not confirmed)


def test_every_state_is_reached_and_only_one_is_the_end():
    assert {after for edges in EDGES.values() for after in edges} == set(State)
    assert [state for state, edges in EDGES.items() if not edges] == [State.GONE]


def test_restarts_are_counted_in_a_row_with_longer_and_longer_pauses():
    life, pauses = Life(8), []
    for _ in range(8):
        assert life.may_restart
        pauses.append(life.restart_after_s)
        life.lose()
        life.restart()
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert not life.may_restart
    life.answers()
    assert not life.may_restart  # to answer is not to serve
    life.serve()
    assert life.may_restart
    assert life.starts == 9


def test_an_engine_hangs_when_it_counts_nothing_for_too_long():
    pulse = Pulse(10)
    pulse.beat(0)
    pulse.count((1, 2), 4)
    pulse.count((1, 2), 9)
    assert not pulse.hangs(14)
    assert pulse.hangs(14.1)
    pulse.count((1, 3), 15)
    assert not pulse.hangs(25)
    assert pulse.silent_s(20) == 5
