"""When an engine is said to stand still."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.blocks import KvLayout
from penstock.cluster import Load, Member, Standing
from penstock.policy.liveness import Liveness, Patience, Watch, watch

PATIENCE = Patience(floor_s=10.0, first_s=60.0, times=10.0)
LAYOUT = KvLayout(1, 1, 8, 16, "float32")

seconds = st.floats(0.001, 100.0)


def seen(reports: list[tuple[float, int, float]], patience: Patience = PATIENCE) -> Watch:
    """What reports (at_s, steps, step_s) show."""
    known = None
    for at_s, steps, step_s in reports:
        known = watch(known, at_s, steps, step_s, patience)
    assert known is not None
    return known


def standing(at_s: float, steps: int, step_s: float, epoch: int = 1, worker: str = "w") -> Standing:
    member = Member(worker, epoch, "any", "m", (), LAYOUT, blocks=1, max_context_tokens=16)
    return Standing(member, Load(at_s=at_s, steps=steps, step_s=step_s))


def test_an_engine_that_overstays_its_call_by_far_is_stalled() -> None:
    reports = [(float(at_s), 5, 0.02) for at_s in range(11)]
    assert not seen(reports).is_stalled
    assert seen([*reports, (11.0, 5, 0.02)]).is_stalled
    assert not seen([*reports, (11.0, 6, 0.02)]).is_stalled
    assert not seen([*reports, (11.0, 5, 0.0)]).is_stalled


def test_long_calls_have_as_much_time_as_they_need() -> None:
    assert not seen([(0.0, 5, 30.0), (299.0, 5, 30.0)]).is_stalled
    assert seen([(0.0, 5, 30.0), (301.0, 5, 30.0)]).is_stalled


def test_the_first_step_may_compile() -> None:
    assert not seen([(0.0, 0, 0.02), (59.0, 0, 0.02)]).is_stalled
    assert seen([(0.0, 0, 0.02), (61.0, 0, 0.02)]).is_stalled


def test_an_idle_engine_is_in_peace_and_its_next_call_counts_from_its_beginning() -> None:
    assert not seen([(0.0, 5, 0.0), (1e6, 5, 0.0), (1e6 + 1, 5, 0.02), (1e6 + 9, 5, 0.02)]).is_stalled
    waiting = Patience(idle_s=60.0)
    assert seen([(0.0, 5, 0.0), (61.0, 5, 0.0)], waiting).is_stalled


@given(st.lists(st.tuples(seconds, st.integers(1, 100)), min_size=1), seconds)
def test_an_engine_whose_steps_move_between_reports_never_is(pauses: list[tuple[float, int]], step_s: float) -> None:
    known, at_s, steps = None, 0.0, 0
    for pause_s, made in pauses:
        at_s, steps = at_s + pause_s, steps + made
        known = watch(known, at_s, steps, step_s, PATIENCE)
        assert not known.is_stalled


@given(st.lists(seconds, min_size=1), seconds, seconds)
def test_a_call_that_takes_at_most_ten_times_what_was_predicted_never_is(
    predictions: list[float], share: float, report_s: float
) -> None:
    known, at_s = None, 0.0
    for steps, step_s in enumerate(predictions):
        ended_s = at_s + 0.999 * PATIENCE.times * step_s * min(1.0, share)
        while at_s < ended_s:
            known = watch(known, at_s, steps, step_s, PATIENCE)
            assert not known.is_stalled
            at_s = min(ended_s, at_s + max(report_s, step_s / 10))


@given(st.integers(0, 5), seconds, seconds)
def test_an_engine_that_stands_still_is_found_within_a_report_of_the_bound(
    steps: int, step_s: float, report_s: float
) -> None:
    known, at_s = watch(None, 0.0, steps, step_s, PATIENCE), 0.0
    while not known.is_stalled:
        at_s += report_s + PATIENCE.bound_s(steps, step_s) / 100
        known = watch(known, at_s, steps, step_s, PATIENCE)
    assert at_s <= 1.02 * PATIENCE.bound_s(steps, step_s) + report_s


def test_a_fleet_tells_who_stalled_and_who_came_back() -> None:
    liveness = Liveness(PATIENCE)
    assert liveness.update({"w": standing(0, 1, 0.1), "v": standing(0, 1, 0.1, worker="v")}) == ({}, {})
    stalled, back = liveness.update({"w": standing(11, 1, 0.1), "v": standing(11, 2, 0.1, worker="v")})
    assert (list(stalled), back, list(liveness.stalled)) == (["w"], {}, ["w"])
    assert stalled["w"].still_s == 11
    assert liveness.update({"w": standing(12, 1, 0.1)}) == ({}, {}) and liveness.stalled
    stalled, back = liveness.update({"w": standing(13, 2, 0.1)})
    assert (stalled, list(back), liveness.stalled) == ({}, ["w"], {})
    assert back["w"].still_s == 12


def test_another_incarnation_owes_nothing() -> None:
    liveness = Liveness(PATIENCE)
    for at_s in (0, 11):
        liveness.update({"w": standing(at_s, 1, 0.1)})
    assert liveness.stalled
    stalled, moving = liveness.update({"w": standing(12, 1, 0.1, epoch=2)})
    assert (stalled, list(moving), list(liveness.stalled)) == ({}, ["w"], [])
    liveness.update({"w": standing(23, 1, 0.1, epoch=2)})
    assert liveness.stalled
    assert liveness.update({}) == ({}, {}) and not liveness.stalled


def test_a_report_that_comes_again_changes_nothing() -> None:
    liveness = Liveness(PATIENCE)
    for _ in range(100):
        assert liveness.update({"w": standing(5, 1, 0.1)}) == ({}, {})
