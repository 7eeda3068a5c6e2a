"""The schedule: who sits where, and in which order graphs are launched, without a device."""

from __future__ import annotations

from autospec.runtime.request import Request
from autospec.runtime.schedule import Launch, Schedule


def _play(schedule: Schedule, lag: int = 0) -> tuple[list[str], int]:
    """Run it as a session does, a token per launch; every launch as letters of who emits, and the surplus seats."""
    log, under_way, surplus = [], [], 0
    schedule.admit()
    while (wanted := schedule.wanted) or under_way or schedule.waiting:
        if wanted:
            launch = (
                schedule.launch_chunk() if wanted == "chunk"
                else schedule.launch_lone_chunk() if wanted == "lone chunk"
                else schedule.launch_step(0)
            )  # fmt: skip
            under_way.append(launch)
            log.append(wanted[0] + "".join(str(seat.number) for seat in launch.seats))
        while len(under_way) > (lag if wanted else 0):
            surplus += _deliver(under_way.pop(0))
        schedule.admit()
    return log, surplus


def _deliver(launch: Launch) -> int:
    """One token for everybody who has not ended; how many had."""
    ended = 0
    for seat in launch.seats:
        seat.promised -= 1
        ended += seat.request.is_done
        if not seat.request.is_done:
            seat.request.take(9, frozenset())
    return ended


def _requests(*sizes: tuple[int, int]) -> list[Request]:
    return [Request([1] * prompt, count) for prompt, count in sizes]


def test_at_the_start_prompts_are_read_first() -> None:
    log, _ = _play(Schedule(_requests((9, 2), (3, 3)), batch_size=2, chunk=4))
    assert log == ["c1", "c", "c0", "s01", "s1"]


def test_rows_that_decode_take_turns_with_a_long_prompt() -> None:
    log, _ = _play(Schedule(_requests((2, 1), (2, 9), (9, 2)), batch_size=2, chunk=4))
    assert log == ["c01", "s1", "c", "s1", "c", "s1", "c2", "s21", "s1", "s1", "s1", "s1"]


def test_a_row_is_given_away_when_its_last_token_is_under_way() -> None:
    """max_new_tokens is known beforehand, so late reading wastes no launch on it."""
    requests = _requests((2, 3), (2, 3), (2, 2))
    log, surplus = _play(Schedule(requests, batch_size=2, chunk=4), lag=1)
    assert log == ["c01", "s01", "s01", "c2", "s2"]
    assert surplus == 0
    assert [len(request.output) for request in requests] == [3, 3, 2]


def test_a_stop_is_seen_one_launch_late() -> None:
    requests = _requests((2, 9), (2, 1))
    requests[0].should_stop = lambda ids: len(ids) == 4
    log, surplus = _play(Schedule(requests, batch_size=1, chunk=4), lag=1)
    assert log == ["c0", "s0", "s0", "c1"]
    assert surplus == 1
    assert len(requests[0].output) == 2


def test_first_come_first_served() -> None:
    schedule = Schedule(_requests(*[(1, 2)] * 5), batch_size=2, chunk=4)
    assert [(seat.row, seat.number) for seat in schedule.admit()] == [(0, 0), (1, 1)]
    assert schedule.admit() == []
    log, _ = _play(schedule)
    assert log == ["c01", "s01", "c23", "s23", "c4", "s4"]


def test_prompts_of_refilled_rows_are_read_one_by_one() -> None:
    """Two rows end together: their successors read alone (l), in turns with the row that decodes."""
    requests = _requests((2, 1), (2, 1), (2, 9), (6, 2), (3, 3))
    log, _ = _play(Schedule(requests, batch_size=3, chunk=4, has_reader=True))
    assert log == ["c012", "s2", "l", "s2", "l3", "s32", "l4", "s42", "s42", "s2", "s2", "s2"]


def test_where_nobody_decodes_a_reader_waits() -> None:
    """All rows end together, and their successors are read together."""
    log, _ = _play(Schedule(_requests((2, 1), (2, 1), (6, 1), (3, 1)), batch_size=2, chunk=4, has_reader=True))
    assert log == ["c01", "c3", "c2"]
