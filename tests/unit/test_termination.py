"""TerminationPlan: order, isolation, deadlines, once."""

from __future__ import annotations

import threading
import time

import pytest

from qvmcore.termination import Phase, TerminationCallback, TerminationPlan
from qvmcore.types import GuestEnd, Reason

END = GuestEnd(Reason.GUEST_SHUTDOWN)


def test_phases_run_in_the_order_of_danger() -> None:
    plan, order = TerminationPlan(), []
    for phase in reversed(Phase):
        plan.add(TerminationCallback(phase.name, phase, lambda end, p=phase: order.append(p)))
    results = plan.run(END)
    assert order == [Phase.STOP_DMA, Phase.MASK_IRQ, Phase.STOP_WORKERS, Phase.FLUSH, Phase.RELEASE]
    assert [r.verdict for r in results] == ["ok"] * 5


@pytest.mark.parametrize("raised", [RuntimeError("boom"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_an_exception_stops_nobody_else(raised: BaseException) -> None:
    plan, ran = TerminationPlan(), []

    def bad(end: GuestEnd) -> None:
        raise raised

    plan.add(TerminationCallback("first", Phase.STOP_DMA, lambda end: ran.append("first")))
    plan.add(TerminationCallback("bad", Phase.STOP_DMA, bad))
    plan.add(TerminationCallback("last", Phase.RELEASE, lambda end: ran.append("last")))
    verdicts = {r.name: r.verdict for r in plan.run(END)}
    assert ran == ["first", "last"]
    assert verdicts == {"bad": "failed", "first": "ok", "last": "ok"}


def test_a_hang_costs_its_own_deadline_only_and_is_reported_with_its_stack() -> None:
    plan, ran, release = TerminationPlan(), [], threading.Event()

    def hang(end: GuestEnd) -> None:
        release.wait(60)

    plan.add(TerminationCallback("hang", Phase.STOP_DMA, hang, deadline=0.05))
    plan.add(TerminationCallback("beside", Phase.STOP_DMA, lambda end: ran.append("beside")))
    plan.add(TerminationCallback("after", Phase.RELEASE, lambda end: ran.append("after")))
    results = {r.name: r for r in plan.run(END)}
    release.set()
    assert results["hang"].verdict == "late"
    assert "release.wait" in results["hang"].detail
    assert set(ran) == {"beside", "after"}


def test_a_slow_callback_within_its_deadline_holds_the_next_phase() -> None:
    plan, order = TerminationPlan(), []

    def slow(end: GuestEnd) -> None:
        time.sleep(0.05)
        order.append("slow")

    plan.add(TerminationCallback("slow", Phase.STOP_DMA, slow, deadline=30))
    plan.add(TerminationCallback("next", Phase.RELEASE, lambda end: order.append("next")))
    plan.run(END)
    assert order == ["slow", "next"]


def test_it_runs_once_and_later_callers_get_the_first_results() -> None:
    plan, runs = TerminationPlan(), []
    plan.add(TerminationCallback("one", Phase.FLUSH, lambda end: runs.append(1)))
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(plan.run(END))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs == [1]
    assert len({id(result) for result in seen}) == 1


def test_steps_cannot_be_added_while_it_runs() -> None:
    plan = TerminationPlan()
    plan.run(END)
    with pytest.raises(ValueError, match="already running"):
        plan.add(TerminationCallback("late", Phase.FLUSH, lambda end: None))


def test_without_a_thread_the_steps_run_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is out of threads: a step without a deadline is better than none."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    plan, ran = TerminationPlan(), []
    for phase in (Phase.STOP_DMA, Phase.RELEASE):
        plan.add(TerminationCallback(phase.name, phase, lambda end, p=phase: ran.append(p)))
    assert [result.verdict for result in plan.run(END)] == ["ok", "ok"]
    assert ran == [Phase.STOP_DMA, Phase.RELEASE]
