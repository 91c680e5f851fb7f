"""Worker and EventFd."""

from __future__ import annotations

import os
import threading
import time

import pytest

from qvmcore.events import EventFd, Worker


def make() -> tuple[Worker, list[BaseException]]:
    errors: list[BaseException] = []
    return Worker("test", errors.append), errors


def test_eventfd_adds_up_to_one_wake_up() -> None:
    event = EventFd()
    event.signal()
    event.signal()
    assert event.drain() == 2
    assert event.drain() == 0
    event.close()
    event.close()
    event.signal()  # after close: nobody waits, nothing is written to a stranger's descriptor


def test_worker_reads_a_pipe_and_survives_an_exception() -> None:
    worker, errors = make()
    reader, writer = os.pipe()
    got: list[bytes] = []
    arrived = threading.Event()

    def readable() -> None:
        got.append(os.read(reader, 100))
        arrived.set()
        if got[-1] == b"bad":
            raise RuntimeError("boom")

    worker.watch(reader, readable)
    for text in (b"bad", b"good"):
        arrived.clear()
        os.write(writer, text)
        assert arrived.wait(10)
    assert got == [b"bad", b"good"]
    assert worker.stop(10)
    assert [str(error) for error in errors] == ["boom"]
    os.close(reader)
    os.close(writer)


def test_calls_and_timers_run_in_order_on_the_worker_thread() -> None:
    worker, _ = make()
    seen: list[tuple[str, int]] = []
    done = threading.Event()

    def note(text: str) -> None:
        seen.append((text, threading.get_ident()))

    worker.call_later(0.02, lambda: (note("timer"), done.set()))
    worker.call(lambda: note("call"))
    assert done.wait(10)
    assert [text for text, _ in seen] == ["call", "timer"]
    assert {ident for _, ident in seen} == {worker.ident}
    assert worker.stop(10)


def test_stop_leaves_no_descriptor_and_no_thread() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        worker, _ = make()
        worker.call(lambda: None)
        assert worker.stop(10)
        assert not worker.alive
    assert set(os.listdir("/proc/self/fd")) <= before | {str(max(map(int, before)) + 1)}


def test_stop_of_a_worker_that_hangs_says_so() -> None:
    worker, _ = make()
    release, entered = threading.Event(), threading.Event()
    worker.call(lambda: (entered.set(), release.wait(60)))
    assert entered.wait(10)
    assert not worker.stop(0.05)
    release.set()
    assert worker.stop(10)


def test_stop_before_any_use_and_twice() -> None:
    worker, _ = make()
    assert worker.stop(1)
    worker.call(lambda: pytest.fail("a stopped worker runs nothing"))
    assert not worker.alive


def test_unwatch_of_a_closed_descriptor_is_harmless() -> None:
    worker, errors = make()
    reader, writer = os.pipe()
    worker.watch(reader, lambda: None)
    os.close(reader)
    worker.unwatch(reader)
    worker.unwatch(reader)
    os.close(writer)
    assert worker.stop(10)
    assert errors == []


def test_serial_worker_holds_its_lock_while_a_callback_runs() -> None:
    lock = threading.Lock()
    errors: list[BaseException] = []
    worker = Worker("serial", errors.append, lock)
    held: list[bool] = []
    done = threading.Event()
    worker.call(lambda: (held.append(lock.locked()), done.set()))
    assert done.wait(10)
    assert held == [True]
    assert worker.stop(10)
    assert not lock.locked()


def idle() -> Worker:
    """A worker with a thread that waits."""
    worker, _ = make()
    started = threading.Event()
    worker.call(started.set)
    assert started.wait(10)
    assert worker.without_visitor(10)
    return worker


def test_a_visitor_has_an_idle_worker_to_itself() -> None:
    worker = idle()
    called, here, go = threading.Event(), threading.Event(), threading.Event()
    idents: list[int | None] = []
    results: list[bool] = []

    def stay() -> bool:
        idents.append(worker.ident)
        here.set()
        return go.wait(10)

    visitor = threading.Thread(target=lambda: results.append(worker.visit(stay)))
    visitor.start()
    assert here.wait(10)
    assert not worker.visit(lambda: True)  # one at a time
    assert not worker.without_visitor(0)
    worker.call(called.set)
    assert not called.wait(0.1)
    go.set()
    visitor.join(10)
    assert called.wait(10)
    assert results == [True]
    assert idents == [visitor.ident]
    assert worker.ident not in (visitor.ident, None)
    assert worker.stop(10)
    assert not worker.visit(lambda: True)


def test_nobody_visits_a_worker_that_is_not_idle() -> None:
    worker, _ = make()
    assert not worker.visit(lambda: True)  # no thread yet: nobody could take over what is left
    here, go = threading.Event(), threading.Event()

    def work() -> None:
        here.set()
        go.wait(10)

    worker.call(work)
    assert here.wait(10)
    assert not worker.visit(lambda: True)
    go.set()
    assert worker.stop(10)


def test_what_a_visitor_raises_is_the_visitors() -> None:
    worker = idle()

    def fail() -> bool:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        worker.visit(fail)
    assert worker.visit(lambda: True)
    assert worker.stop(10)


def test_stop_waits_for_a_visitor() -> None:
    worker = idle()
    here, go = threading.Event(), threading.Event()

    def stay() -> bool:
        here.set()
        return go.wait(10)

    visitor = threading.Thread(target=worker.visit, args=(stay,))
    visitor.start()
    assert here.wait(10)
    assert not worker.stop(0.2)
    go.set()
    visitor.join(10)
    assert worker.stop(10)


def test_a_visitor_may_stop_the_worker() -> None:
    worker = idle()
    assert worker.visit(lambda: worker.stop(10))
    assert worker.stop(10)
    assert not worker.alive


def test_a_watch_that_a_visitor_ends_is_not_served_any_more() -> None:
    worker = idle()
    event = EventFd()
    served: list[int] = []
    passed = threading.Event()
    worker.watch(event.fd, lambda: served.append(event.drain()))

    def end_it() -> bool:
        event.signal()
        time.sleep(0.1)  # the worker has seen it and waits for its turn
        worker.unwatch(event.fd)
        return True

    assert worker.visit(end_it)
    worker.call(passed.set)
    assert passed.wait(10)
    assert served == []
    assert worker.stop(10)
    event.close()


def test_a_worker_that_polls_is_as_good_as_one_that_sleeps() -> None:
    """Descriptors, calls and timers while it looks and while it sleeps; and it ends."""
    worker = Worker("poller", lambda error: pytest.fail(str(error)), poll=0.002)
    seen: list[str] = []
    wake = EventFd()
    worker.watch(wake.fd, lambda: (wake.drain(), seen.append("fd")))
    done = threading.Event()
    worker.call_later(0.01, lambda: seen.append("timer"))
    for pause in (0.0, 0.0, 0.01, 0.0):
        before = len(seen)
        wake.signal()
        while len(seen) == before:
            time.sleep(0.0001)
        worker.call(lambda: seen.append("call"))
        time.sleep(pause)
    worker.call_later(0.02, done.set)
    assert done.wait(5)
    assert sorted(seen) == ["call"] * 4 + ["fd"] * 4 + ["timer"]
    assert worker.stop(5)
    wake.close()
