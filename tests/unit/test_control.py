"""The control socket: one report for each client, whatever clients do; and the machine behind it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qvmcore import control, rundir
from qvmcore.control import ControlServer, ask, find
from qvmcore.errors import HostError
from qvmcore.rundir import RunningVm
from qvmcore.testing.engine import ScriptedEngine, ScriptedGuest
from qvmcore.testing.host import machine
from qvmcore.vdev import Vdev


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run directory of the test's own; afterwards nothing is left in it, and no thread."""
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    threads = set(threading.enumerate())
    yield folder / "qvm"
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= threads
    assert not (folder / "qvm").exists() or list((folder / "qvm").iterdir()) == []


def client() -> socket.socket:
    """A client that has connected to the VM called ``vm``."""
    directory = os.open(rundir.base() / "vm", os.O_RDONLY)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(f"/proc/self/fd/{directory}/control")
    os.close(directory)
    return sock


def test_a_client_gets_the_report_and_the_end_of_the_connection() -> None:
    with ControlServer("vm", lambda name: {"name": name, "x": [1, 2]}):
        assert ask(find("vm")) == {"name": "vm", "x": [1, 2]}
        with client() as sock:
            text = b"".join(iter(lambda: sock.recv(4096), b""))
        assert text == b'{"name": "vm", "x": [1, 2]}\n'


def test_a_vm_is_found_by_name_and_by_process_number() -> None:
    with ControlServer("vm", lambda name: {}), ControlServer("vm", lambda name: {}):
        assert find("vm.2").name == "vm.2"
        assert find(str(os.getpid())).name == "vm"


def test_an_unknown_vm_is_told_with_what_comes_near_or_runs() -> None:
    with pytest.raises(HostError, match=r"no running VM is called 'vm' \(in .*\); none is running"):
        find("vm")
    with ControlServer("first", lambda name: {}):
        with pytest.raises(HostError, match="did you mean 'first'"):
            find("frist")
        with pytest.raises(HostError, match="running: first"):
            find("0")


def test_clients_that_do_not_read_hold_up_the_next_one_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "SEND_PATIENCE", 0.05)
    report = {"filler": "x" * (4 << 20)}
    with ControlServer("vm", lambda name: report), contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(client())
        assert ask(find("vm")) == report


def test_clients_that_go_at_once_or_talk_do_no_harm() -> None:
    with ControlServer("vm", lambda name: {"fine": True}):
        for _ in range(5):
            client().close()
            with client() as sock, contextlib.suppress(OSError):
                sock.sendall(b"GET / HTTP/1.0\r\n\r\n" * 10000)
        assert ask(find("vm")) == {"fine": True}


def test_a_report_that_raises_closes_the_connection_and_the_server_goes_on() -> None:
    reports = iter([RuntimeError("bug"), {"fine": True}])

    def report(name: str) -> object:
        if isinstance(value := next(reports), Exception):
            raise value
        return value

    with ControlServer("vm", report):
        with pytest.raises(HostError, match="vm gives an answer that is no status report"):
            ask(find("vm"))
        assert ask(find("vm")) == {"fine": True}


def test_more_clients_than_the_socket_lets_wait_are_all_served() -> None:
    answers: list[dict[str, Any]] = []
    with ControlServer("vm", lambda name: {"fine": True}):
        vm = find("vm")
        threads = [threading.Thread(target=lambda: answers.append(ask(vm))) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [{"fine": True}] * 40


def test_the_end_does_not_wait_for_a_report_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "STOP_PATIENCE", 0.05)
    asked, release = threading.Event(), threading.Event()

    def report(name: str) -> object:
        asked.set()
        release.wait(20)
        return {}

    with ControlServer("vm", report):
        sock = client()
        assert asked.wait(10)
    assert "control" in [thread.name for thread in threading.enumerate()]
    assert rundir.running() == []
    release.set()
    sock.close()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "no status report"),
        (b"[1]", "no status report"),
        (b"\xff", "no status report"),
        (b'{"x": "' + b"x" * 5000 + b'"}', "no status report"),
        (None, "does not answer within"),
    ],
    ids=["nothing", "no object", "no text", "too long", "silence"],
)
def test_what_is_no_report_is_told_as_that(
    answer: bytes | None, told: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "ASK_PATIENCE", 0.1 if answer is None else 10)
    monkeypatch.setattr(control, "ANSWER_LIMIT", 4096)
    directory = rundir.RunDirectory.create("vm")
    done = threading.Event()

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            if answer is None:
                done.wait(20)
            else:
                with contextlib.suppress(OSError):
                    peer.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{directory.fd}/control")
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(HostError, match=told):
            ask(find("vm"))
        done.set()
        thread.join()
    directory.close()


def test_a_vm_without_a_socket_is_told_as_starting_or_ending(place: Path) -> None:
    with pytest.raises(HostError, match="it may be starting or ending"):
        ask(RunningVm("gone", 1, place / "gone"))


def test_no_run_directory_is_a_warning_and_nothing_is_left_open(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.mkdir()
    place.chmod(0o777)
    before = len(os.listdir("/proc/self/fd"))
    with ControlServer("vm", lambda name: {}):
        assert len(os.listdir("/proc/self/fd")) == before
    assert f"'qvm status' will not find this VM: the run directory {place} is open" in caplog.text


def test_a_socket_that_cannot_be_is_a_warning_and_nothing_is_left(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_address", lambda directory: "x" * 200)
    before = len(os.listdir("/proc/self/fd"))
    with ControlServer("vm", lambda name: {}):
        assert len(os.listdir("/proc/self/fd")) == before
        assert list(place.iterdir()) == []
    assert "'qvm status' will not find this VM: AF_UNIX path too long" in caplog.text


# -- the machine behind it -----------------------------------------------------------------------


class Counting(Vdev):
    """Has a status."""

    vdev_type = "counting"

    def status(self) -> dict[str, object]:
        return {"seen": 3, "path": Path("/x")}


class Hanging(Vdev):
    """Its status() does not return."""

    vdev_type = "hanging"
    release = threading.Event()
    calls = 0

    def status(self) -> dict[str, object]:
        Hanging.calls += 1
        self.release.wait(20)
        return {}


class Bad(Vdev):
    """Its status() is of no use."""

    vdev_type = "bad"
    answer: Callable[[], Any]

    def status(self) -> dict[str, object]:
        return Bad.answer()  # type: ignore[no-any-return]


def exits() -> None:
    raise SystemExit(3)


def running(tmp_path: Path, *classes: type[Vdev], look: Callable[[ScriptedGuest], None]) -> None:
    """Run a machine and look at it while it runs; what the look raises is raised here."""
    errors: list[BaseException] = []

    def script(guest: ScriptedGuest) -> None:
        try:
            look(guest)
        except BaseException as error:
            errors.append(error)
        guest.power_off()

    machine(classes, ScriptedEngine(script), tmp_path).run()
    if errors:
        raise errors[0]


def report() -> dict[str, Any]:
    """The report of the machine under test, once its main thread has got to its loop."""
    while (found := ask(find("test")))["state"] == "starting":
        time.sleep(0.01)
    return found


def test_the_report_of_a_machine(tmp_path: Path) -> None:
    def look(guest: ScriptedGuest) -> None:
        found = report()
        assert found.pop("uptime") >= 0
        assert found == {
            "name": "test",
            "vm": "test",
            "pid": os.getpid(),
            "state": "running",
            "engine": "scripted",
            "board": "arm64-virt",
            "cpus": 1,
            "ram": 8 << 20,
            "guest": {"status": {}, "problem": ""},
            "vdevs": [
                {
                    "name": "counting",
                    "type": "counting",
                    "fault": "",
                    "guest_errors": 0,
                    "status": {"seen": 3, "path": "/x"},
                    "problem": "",
                }
            ],
        }

    running(tmp_path, Counting, look=look)


def test_a_status_that_hangs_is_named_asked_once_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvmcore.inquiry.PATIENCE", 0.1)
    Hanging.release.clear()
    Hanging.calls = 0

    def look(guest: ScriptedGuest) -> None:
        for _ in range(3):
            hanging, counting = report()["vdevs"]
            assert hanging["problem"] == "status() did not return within 0.1 s"
            assert counting["status"]["seen"] == 3
        assert Hanging.calls == 1
        Hanging.release.set()
        while report()["vdevs"][0]["problem"]:
            time.sleep(0.01)

    running(tmp_path, Hanging, Counting, look=look)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda: {"x": "y" * 100_000}, "status() gave 100009 characters"),
        (lambda: 5, "status() raised TypeError"),
        (lambda: {(1, 2): 3}, "status() raised TypeError"),
        (lambda: {"x": float("nan")}, "status() raised ValueError"),
        (exits, "status() raised SystemExit: 3"),
    ],
    ids=["too long", "no mapping", "odd key", "no JSON number", "exit"],
)
def test_a_status_of_no_use_is_told_and_hides_nothing_else(
    tmp_path: Path, answer: Callable[[], Any], told: str
) -> None:
    Bad.answer = staticmethod(answer)

    def look(guest: ScriptedGuest) -> None:
        bad, counting = report()["vdevs"]
        assert bad["problem"].startswith(told)
        assert bad["status"] == {}
        assert counting["status"]["seen"] == 3

    running(tmp_path, Bad, Counting, look=look)


def test_a_machine_that_is_ending_answers_without_asking_its_vdevs(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Slow(Vdev):
        vdev_type = "slow"

        def on_terminate(self, end: object) -> None:
            seen.append(ask(find("test")))

    running(tmp_path, Slow, look=lambda guest: None)
    assert (seen[0]["state"], seen[0]["vdevs"]) == ("ending", [])


def test_two_machines_of_one_name_in_one_process_are_two(tmp_path: Path) -> None:
    inner: list[str] = []

    def look(guest: ScriptedGuest) -> None:
        def second(guest: ScriptedGuest) -> None:
            inner.extend(vm.name for vm in rundir.running())
            guest.power_off()

        machine((Counting,), ScriptedEngine(second), tmp_path).run()
        inner.extend(vm.name for vm in rundir.running())

    running(tmp_path, look=look)
    assert inner == ["test", "test.2", "test"]
