"""Who may send what to which engine: first come, first served, by prefix and load, with limits that adapt."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.rollout.routing import Ask, Routing

_tickets = itertools.count()


def router(most, *names):
    routing = Routing(most)
    for name in names:
        routing.open(name)
    return routing


def ask(routing, num, uid=None, **fields):
    ticket = fields.pop("ticket", None)
    ticket = next(_tickets) if ticket is None else ticket
    one = Ask(ticket, num, f"uid {ticket}" if uid is None else uid, **fields)
    routing.ask(one)
    return one


def granted(routing):
    return [(one.num, name) for one, name in routing.grants()]


def test_work_goes_to_the_least_loaded_engine():
    routing = router(10, "a", "b")
    for num in (4, 1, 2, 3):
        ask(routing, num)
    # 4 -> a; 1 -> b; b has less: 2 -> b; 3 -> b has 3 < 4
    assert granted(routing) == [(4, "a"), (1, "b"), (2, "b"), (3, "b")]
    assert routing.num_in_flight == 10


def test_nobody_overtakes_the_oldest_request_even_where_there_is_room_for_less():
    routing = router(4, "a")
    ask(routing, 3)
    ask(routing, 2)
    ask(routing, 1)
    assert granted(routing) == [(3, "a")]
    assert routing.num_waiting == 3
    routing.release("a", 3)
    assert granted(routing) == [(2, "a"), (1, "a")]


def test_a_resumed_part_of_an_old_prompt_goes_before_new_prompts():
    routing = router(1, "a")
    for ticket in (7, 8, 3):
        ask(routing, 1, ticket=ticket)
    order = []
    for _ in range(3):
        ((one, name),) = routing.grants()
        order.append(one.ticket)
        routing.release(name, 1)
    assert order == [3, 7, 8]


def test_a_group_larger_than_an_engine_goes_alone():
    routing = router(4, "a")
    ask(routing, 9)
    ask(routing, 1)
    assert granted(routing) == [(9, "a")]
    routing.release("a", 9)
    assert granted(routing) == [(1, "a")]


def test_a_prompt_returns_to_the_engine_that_has_its_prefix_unless_that_is_clearly_busier():
    routing = router(100, "a", "b")
    ask(routing, 5, "p")
    assert granted(routing) == [(5, "a")]
    ask(routing, 5, "p")
    assert granted(routing) == [(5, "a")]  # b is emptier, but not by a quarter
    ask(routing, 30, "q")
    assert granted(routing) == [(30, "b")]
    ask(routing, 5, "q")
    assert granted(routing) == [(5, "b")]  # 30 against 10
    ask(routing, 1, "q")
    assert granted(routing) == [(1, "b")]  # 35 against 10 is just a quarter
    ask(routing, 1, "q")
    assert granted(routing) == [(1, "a")]  # 36 against 10 is more
    ask(routing, 1, "q")
    assert granted(routing) == [(1, "a")]  # where its newest prefix is


def test_a_closed_engine_gets_nothing_and_ends_what_it_has():
    routing = router(10, "a", "b")
    ask(routing, 5, "p")
    assert granted(routing) == [(5, "a")]
    routing.close("a")
    ask(routing, 5, "p")
    assert granted(routing) == [(5, "b")]
    routing.release("a", 5)
    routing.close("b")
    ask(routing, 1)
    assert granted(routing) == []
    routing.open("a")
    assert granted(routing) == [(1, "a")]


def test_an_engine_that_failed_a_request_is_avoided_where_there_is_another():
    routing = router(10, "a", "b")
    ask(routing, 1, avoid=frozenset({"a"}))
    ask(routing, 1, avoid=frozenset({"a"}))
    assert granted(routing) == [(1, "b"), (1, "b")]
    routing.close("b")
    ask(routing, 1, avoid=frozenset({"a"}))
    assert granted(routing) == [(1, "a")]


def test_whoever_withdraws_is_passed_over():
    routing = router(1, "a")
    _, second, third = (ask(routing, 1) for _ in range(3))
    assert granted(routing) == [(1, "a")]
    routing.withdraw(second)
    routing.withdraw(second)
    assert routing.num_waiting == 1
    routing.release("a", 1)
    assert [one for one, _ in routing.grants()] == [third]


def test_the_limit_shrinks_by_a_fifth_for_a_lasting_queue_and_grows_slowly_without_one():
    routing = router(64, "a")
    for _ in range(64):
        ask(routing, 1)
    assert len(granted(routing)) == 64
    routing.observe("a", running=40, queued=24)
    assert routing.limit == 64  # it may be taking them in
    routing.observe("a", running=40, queued=24)
    assert routing.limit == pytest.approx(51.2)
    routing.observe("a", running=40, queued=24)
    assert routing.limit == pytest.approx(51.2)  # the cut has not taken effect: 64 are still there
    routing.release("a", 20)
    routing.observe("a", running=44, queued=0)
    assert routing.limit == pytest.approx(53.2)
    for _ in range(20):
        routing.observe("a", running=44, queued=0)
    assert routing.limit == 64


def test_a_retraction_shrinks_the_limit_at_once():
    routing = router(10, "a")
    ask(routing, 10)
    granted(routing)
    routing.observe("a", running=10, queued=0, retracted=True)
    assert routing.limit == 8


def test_a_limit_that_does_not_bind_does_not_grow():
    routing = router(10, "a")
    ask(routing, 10)
    granted(routing)
    routing.observe("a", running=10, queued=0, retracted=True)
    routing.release("a", 10)
    routing.observe("a", running=0, queued=0)
    assert routing.limit == 8
    routing.renew("a")
    assert routing.limit == 10


def test_places_of_a_group_whose_others_have_ended_are_given_away():
    """8 sequences in one request, of which 7 have ended at the engine: the answer waits for the last."""
    routing = router(8, "a")
    ask(routing, 8)
    ask(routing, 4)
    assert granted(routing) == [(8, "a")]
    routing.observe("a", running=1, queued=0)
    assert granted(routing) == []  # others, granted just before that report, may be on their way
    assert routing.num_in_flight == 8
    routing.observe("a", running=1, queued=0)
    assert granted(routing) == [(4, "a")]
    ask(routing, 4)
    assert granted(routing) == []  # 1 reported, 4 granted since


class Model:
    """What must hold of a router, kept in plain lists beside it."""

    def __init__(self):
        self.routing = router(8, "a", "b", "c")
        self.opened, self.waiting, self.running = {"a", "b", "c"}, [], []

    def ask(self, _, num):
        self.waiting.append(ask(self.routing, num))

    def release(self, _, num):
        if self.running:
            self.routing.release(*self.running.pop(num % len(self.running)))

    def withdraw(self, _, num):
        if self.waiting:
            self.routing.withdraw(self.waiting.pop(num % len(self.waiting)))

    def observe(self, name, num):
        busy = sum(n for at, n in self.running if at == name)
        self.routing.observe(name, running=busy, queued=num % 3)

    def open(self, name, _):
        self.routing.open(name)
        self.opened.add(name)

    def close(self, name, _):
        self.routing.close(name)
        self.opened.discard(name)

    def take_grants(self):
        for one, at in self.routing.grants():
            assert one is self.waiting.pop(0)
            assert at in self.opened
            self.running.append((at, one.num))
        assert self.routing.num_waiting == sum(one.num for one in self.waiting)
        assert self.routing.num_in_flight == sum(n for _, n in self.running)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ask", "release", "close", "open", "observe", "withdraw"]),
            st.sampled_from("abc"),
            st.integers(1, 12),
        ),
        max_size=60,
    )
)
@settings(max_examples=200)
def test_nothing_is_lost_doubled_or_overtaken_whatever_happens(steps):
    model = Model()
    for what, name, num in steps:
        getattr(model, what)(name, num)
        model.take_grants()
    for name in "abc":
        model.open(name, 0)
    while model.waiting or model.running:  # all are served in the end
        model.take_grants()
        assert model.running
        model.release("", 0)
