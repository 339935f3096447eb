"""The door in front of a router, with forecasts of the test's own, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import pytest

from penstock import clock
from penstock.errors import DeadlineExceeded, NoWorker, Overloaded, OverShare, PenstockError
from penstock.metrics import QueueMetrics
from penstock.policy.admission import AIM, ServiceLevel
from penstock.policy.forecast import Forecast
from penstock.request import Constraints, Label, Request, Sampling
from penstock.serve.admission import Admission
from penstock.sim.loop import run_virtual

OWN_S = 0.1
GATE_S = 1.0  # of waiting at the workers, for an objective of 2.1 s


@dataclass
class Door:
    """An admission, and what it is told: seconds of waiting, by the first label that a request requires."""

    waits_s: dict[str, float] = field(default_factory=dict)
    level: ServiceLevel = field(default_factory=lambda: ServiceLevel(ttft_s=2.1))
    error: PenstockError | None = None
    passed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.measured = QueueMetrics()
        self.admission = Admission(self.level, self.foresee, self.measured)

    def foresee(self, request: Request) -> Forecast:
        if self.error is not None:
            raise self.error
        lane = next((name for name, _ in request.constraints.require), "")
        return Forecast(self.waits_s.get(lane, 0.0) + OWN_S, OWN_S, 100, 1_000.0)

    async def come(
        self, name: str, tenant: str = "", priority: int = 0, require: tuple[Label, ...] = (), timeout_s: float = 60.0
    ) -> None:
        """Each request that goes through is 0.5 s of work for the workers."""
        wanted = Constraints(require=require, tenant=tenant, priority=priority)
        async with self.admission.admitted(Request(name, "m", b"", Sampling(1), timeout_s, constraints=wanted)):
            self.passed.append(name)
            lane = next((key for key, _ in require), "")
            self.waits_s[lane] = self.waits_s.get(lane, 0.0) + 0.5

    def free(self, lane: str = "", wait_s: float = GATE_S) -> None:
        """The workers have caught up."""
        self.waits_s[lane] = wait_s
        self.admission.look()


def play(story: Callable[[Door], Coroutine[object, object, None]], **door: object) -> None:
    async def with_door() -> None:
        made = Door(**door)  # type: ignore[arg-type]
        await story(made)
        assert made.measured.waiting == 0

    run_virtual(with_door())


def test_requests_go_straight_through_until_workers_are_behind_and_then_one_by_one() -> None:
    async def story(door: Door) -> None:
        asking = [asyncio.create_task(door.come(str(number))) for number in range(6)]
        await asyncio.sleep(0)
        assert door.passed == ["0", "1", "2"], "with 0, 0.5 and 1 s to wait"
        assert door.measured.waiting == 3
        await asyncio.sleep(0.2)
        door.free()
        await asyncio.sleep(0)
        assert door.passed[3:] == ["3"], "who goes is counted before the next one is looked at"
        door.free(wait_s=0.5)
        await asyncio.gather(*asking)
        assert door.passed[4:] == ["4", "5"]
        assert sum(door.measured.wait_s.counts) == 3
        assert not door.measured.shed

    play(story)


def test_the_urgent_first_then_tenants_in_turn() -> None:
    async def story(door: Door) -> None:
        door.waits_s[""] = 1.5
        names = ["a1", "a2", "a3", "b1", "urgent"]
        asking = [asyncio.create_task(door.come(name, tenant=name[0], priority=-(name == "urgent"))) for name in names]
        await asyncio.sleep(0)
        for _ in names:
            door.free()
            await asyncio.sleep(0)
        await asyncio.gather(*asking)
        assert door.passed == ["urgent", "a1", "b1", "a2", "a3"]

    play(story)


def test_who_can_go_elsewhere_overtakes() -> None:
    async def story(door: Door) -> None:
        door.waits_s = {"zone": 1.2, "": 1.2}
        near = asyncio.create_task(door.come("near", require=(("zone", "x"),)))
        anywhere = asyncio.create_task(door.come("anywhere"))
        await asyncio.sleep(0)
        door.free()
        await anywhere
        door.free("zone")
        await near
        assert door.passed == ["anywhere", "near"]

    play(story)


def test_whoever_is_called_and_leaves_passes_the_turn_on() -> None:
    async def story(door: Door) -> None:
        door.waits_s[""] = 1.2
        first, second = (asyncio.create_task(door.come(name)) for name in ("first", "second"))
        await asyncio.sleep(0)
        door.free()
        first.cancel()
        await second
        assert first.cancelled()
        assert door.passed == ["second"]

    play(story)


def test_an_error_of_routing_passes_the_turn_on() -> None:
    async def story(door: Door) -> None:
        door.waits_s[""] = 1.2

        async def stumble() -> None:
            async with door.admission.admitted(Request("r", "m", b"", Sampling(1))):
                raise NoWorker("gone this moment")

        first, second = asyncio.create_task(stumble()), asyncio.create_task(door.come("second"))
        await asyncio.sleep(0)
        door.free()
        await second
        with pytest.raises(NoWorker):
            await first

    play(story)


def test_what_is_expected_too_late_is_refused_at_once_and_says_when_to_come_back() -> None:
    async def story(door: Door) -> None:
        door.waits_s[""] = 4.0
        with pytest.raises(Overloaded, match=r"expected in 4\.1 s, and after 2\.0 s") as caught:
            await door.come("r")
        assert caught.value.retry_after_s == pytest.approx(4.1 - AIM * 2.1)
        assert door.measured.shed == {"predicted": 1}
        with pytest.raises(DeadlineExceeded, match=r"whole 1\.0 s after .* before 4\.1 s"):
            await door.come("r", timeout_s=1.0)
        assert door.measured.shed == {"predicted": 1, "deadline": 1}
        assert clock.now() == 0

    play(story)


def test_patience_stretches_the_limit_but_not_the_queue_at_the_workers() -> None:
    async def story(door: Door) -> None:
        door.waits_s[""] = 4.0
        asking = asyncio.create_task(door.come("r"))
        await asyncio.sleep(3.0)
        assert not door.passed
        door.free()
        await asking

    play(story, level=ServiceLevel(ttft_s=2.1, patience=3.0))


def test_nobody_waits_beyond_the_last_moment() -> None:
    async def story(door: Door) -> None:
        door.waits_s[""] = 1.2
        with pytest.raises(Overloaded, match=r"after 1\.9 s in the queue the first token would come 0\.0 s too late"):
            await door.come("r")
        assert clock.now() == pytest.approx(AIM * 2.1 - OWN_S)
        with pytest.raises(DeadlineExceeded):
            await door.come("r", timeout_s=1.5)
        assert door.measured.shed == {"late": 1, "deadline": 1}

    play(story)


def test_a_turn_that_comes_too_late_goes_to_the_next() -> None:
    async def story(door: Door) -> None:
        door.waits_s[""] = 1.2
        early = asyncio.create_task(door.come("early"))
        await asyncio.sleep(1.5)
        fresh = asyncio.create_task(door.come("fresh"))
        await asyncio.sleep(0)
        door.free()
        await fresh
        with pytest.raises(Overloaded, match=r"0\.6 s too late"):
            await early
        assert door.passed == ["fresh"]

    play(story)


def test_a_full_queue_takes_places_from_those_who_have_most() -> None:
    async def story(door: Door) -> None:
        door.waits_s[""] = 1.2
        many = [asyncio.create_task(door.come(f"a{number}", "a")) for number in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="3 requests wait, the most that may") as full:
            await many[3]
        assert type(full.value) is Overloaded
        few = asyncio.create_task(door.come("b0", "b"))
        with pytest.raises(OverShare, match="a has more than its share") as shared:
            await many[2]
        assert shared.value.retry_after_s == pytest.approx(1.2 + 0.2)
        for _ in range(3):
            door.free()
            await asyncio.sleep(0)
        await asyncio.gather(*many[:2], few)
        assert sorted(door.passed) == ["a0", "a1", "b0"]
        assert door.measured.shed == {"full": 1, "share": 1}

    play(story, level=ServiceLevel(ttft_s=2.1, max_queued=3))


def test_when_nobody_is_left_all_who_wait_are_told() -> None:
    async def story(door: Door) -> None:
        door.waits_s[""] = 1.2
        asking = [asyncio.create_task(door.come(str(number))) for number in range(3)]
        await asyncio.sleep(0)
        door.error = NoWorker("no worker takes requests now")
        door.admission.look()
        for one in asking:
            with pytest.raises(NoWorker):
                await one

    play(story)


def test_forecasts_that_were_too_short_make_the_door_narrower() -> None:
    async def story(door: Door) -> None:
        for number in range(100):
            request = Request(f"r{number}", "m", b"", Sampling(1))
            door.waits_s[""] = 0.5
            async with door.admission.admitted(request):
                pass
            await asyncio.sleep(1.2 * (0.5 + OWN_S))
            door.admission.began(request)
        door.waits_s[""] = 0.9
        asking = asyncio.create_task(door.come("now it must wait"))
        await asyncio.sleep(0)
        assert not door.passed
        door.free(wait_s=0.7)
        await asking

    play(story)
