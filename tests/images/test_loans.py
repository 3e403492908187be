"""The table of what is lent of the GPU's memory: its bound, its ends, on a simulated clock."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.images.protocol import FrameError
from sidecar.images.worker.gpu_lender import GONE, KEPT, REFUSED, SECONDS, HostPiece, Lender
from sidecar.images.worker.loan_table import MOST, PIECES, Loans

A, B, GRAIN = "a" * 32, "b" * 32, 10


def loans(budget: int = 100) -> Loans[int]:
    return Loans(budget, GRAIN)


def taking(sizes: list[int]) -> Callable[[int], int]:
    """An allocator that takes down what was asked for."""

    def allocate(size: int) -> int:
        sizes.append(size)
        return len(sizes)

    return allocate


def test_what_is_lent_counts_in_whole_grains_and_never_exceeds_the_budget() -> None:
    """One byte costs a grain; the piece that does not fit is refused before any memory is asked for; an end makes room."""
    table, sizes = loans(30), list[int]()
    assert table.open(A, 5.0) and table.open(B, 5.0)
    assert table.lend(A, 1, taking(sizes)) == 1 and table.lend(B, 11, taking(sizes)) == 2
    assert (sizes, table.held) == ([10, 20], 30)
    assert table.lend(A, 1, taking(sizes)) is None and sizes == [10, 20]
    assert table.end(B) == [2] and table.held == 10
    assert table.lend(A, 20, taking(sizes)) == 3


def test_memory_that_is_not_there_costs_nothing() -> None:
    """Where the device has none, nothing counts as lent."""
    table = loans()
    assert table.open(A, 5.0) and table.lend(A, 10, lambda _: None) is None
    assert table.held == 0 and table.end(A) == []


@pytest.mark.parametrize("name", ["", "A" * 32, "a" * 31, "../" + "a" * 29, A + "\n"])
def test_a_name_that_is_none_opens_nothing(name: str) -> None:
    """Names are 32 hexadecimal digits, and nothing is lent to a loan that is not open."""
    table = loans()
    assert not table.open(name, 5.0) and table.lend(name, 1, lambda n: n) is None


def test_loans_and_pieces_are_bounded() -> None:
    """No more than MOST loans are open, none twice, and they have no more than PIECES pieces together."""
    table = loans(10**9)
    assert all(table.open(f"{i:032x}", 5.0) for i in range(MOST))
    assert not table.open("f" * 32, 5.0) and not table.open(f"{0:032x}", 5.0)
    assert [table.lend(f"{1:032x}", 1, lambda n: n) for _ in range(PIECES + 1)][-2:] == [GRAIN, None]
    table.end(f"{0:032x}")
    assert table.open("f" * 32, 5.0)


def test_time_ends_a_loan() -> None:
    """The next end is known, so that it is waited for; due is what it has reached."""
    table = loans()
    assert table.wait(0.0) is None
    table.open(A, 5.0)
    table.open(B, 3.0)
    assert (table.wait(1.0), table.due(2.9), table.due(3.0), table.wait(9.0)) == (2.0, [], [B], 0.0)
    table.end(B)
    assert (table.due(5.0), table.end(A), table.due(9.0)) == ([A], [], [])


@given(st.lists(st.tuples(st.sampled_from(["open", "lend", "end"]), st.sampled_from([A, B]), st.integers(0, 60))))
def test_nothing_is_lost_whatever_is_asked(orders: list[tuple[str, str, int]]) -> None:
    """Held is always the sum of what was allocated and not given back, and within the budget."""
    table, live = loans(), dict[int, int]()

    def allocate(size: int) -> int:
        live[len(live) + 1000 * size] = size
        return next(reversed(live))

    for order, name, number in orders:
        if order == "open":
            table.open(name, 1.0)
        elif order == "lend":
            table.lend(name, number, allocate)
        else:
            for piece in table.end(name):
                del live[piece]
        assert table.held == sum(live.values()) <= 100


Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pairs() -> Iterator[Callable[[], Pair]]:
    """A function: a relay's end and the GPU process's."""
    with ExitStack() as stack:

        def made() -> Pair:
            first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            return stack.enter_context(first), stack.enter_context(second)

        yield made


@pytest.fixture
def pair(pairs: Callable[[], Pair]) -> Pair:
    return pairs()


def order(lender: Lender, pair: Pair, what: str, now: float = 0.0) -> bytes:
    lender.hear(pair[1], what.encode(), now)
    return pair[0].recv(64)


def test_a_loan_ends_with_its_time_and_its_holder_hears_of_it(pair: Pair) -> None:
    """After SECONDS the memory is free, and the connection that held it ends."""
    lender = Lender(64 << 20)
    assert order(lender, pair, f'["keep", "{A}"]') == KEPT
    assert lender.loans.lend(A, 5, HostPiece) is not None
    lender.expire(SECONDS - 0.1)
    assert lender.loans.held == 2 << 20
    lender.expire(SECONDS)
    assert lender.loans.held == 0 and pair[0].recv(1) == b""


def test_a_loan_ends_with_its_connection(pair: Pair) -> None:
    """A relay that is gone holds nothing any more."""
    lender = Lender(64 << 20)
    order(lender, pair, f'["keep", "{A}"]')
    lender.loans.lend(A, 5, HostPiece)
    lender.hung_up(pair[1])
    assert lender.loans.held == 0
    lender.hung_up(pair[1])


def test_a_loan_ends_by_its_name(pair: Pair, pairs: Callable[[], Pair]) -> None:
    """Another connection gives it back; the holder hears of it; once more is refused, and so is a second loan on one connection."""
    lender, other = Lender(64 << 20), pairs()
    order(lender, pair, f'["keep", "{A}"]')
    assert order(lender, pair, f'["keep", "{B}"]') == REFUSED
    assert order(lender, other, f'["return", "{A}"]') == GONE and pair[0].recv(1) == b""
    assert order(lender, other, f'["return", "{A}"]') == REFUSED


@pytest.mark.parametrize("text", ["", "{}", "[]", '["keep"]', '["keep", 1]', '["steal", "x"]', "[" * 5000, "\xff"])
def test_nonsense_is_hung_up_on(pair: Pair, text: str) -> None:
    """What is no order raises what the loop hangs up for."""
    with pytest.raises((FrameError, ValueError)):
        Lender(1).hear(pair[1], text.encode("latin-1"), 0.0)
