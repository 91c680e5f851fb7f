"""``qvm serve`` without a protocol: lives, clients, sockets, the end."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qvmcore.api import (
    ClientError,
    GuestEnd,
    HostError,
    MemoryRegion,
    Phase,
    Served,
    Session,
    TerminationCallback,
    Vdev,
    Window,
    hookimpl,
)
from qvmcore.plugins import EntryInfo, PluginHost
from qvmcore.service import Service
from qvmcore.types import LoadSpec, MachineSpec, VdevSpec
from qvmcore.vdev import NoOptions


class Life:
    """What happened to the vdevs of a test, in order."""

    events: ClassVar[list[str]] = []


class Lamp(Vdev):
    """Remembers its life."""

    vdev_type = "lamp"
    windows = (Window(0x20),)
    irqs = 1
    broken: ClassVar[str] = ""

    def on_configured(self) -> None:
        Life.events.append("configured")
        if self.broken == "configured":
            raise HostError("no bulb")
        if self.broken == "files":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self.ctx.on_terminate(lambda end: Life.events.append("dma"), phase=Phase.STOP_DMA)

    def on_starting(self) -> None:
        Life.events.append("starting")

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        return 0x17

    def on_terminate(self, end: GuestEnd) -> None:
        Life.events.append("terminated")

    def on_reset(self) -> None:
        Life.events.append("reset")


class LineServer:
    """A protocol of lines: ``use``, ``memory``, ``read``, ``bad``, ``boom``, ``files``, ``fault``, ``reset``,
    ``end``.
    """

    name: ClassVar[str] = "lines"
    pci: ClassVar[bool] = True

    def refusal(self, cls: type[Vdev]) -> str:
        return "" if cls.windows else "it has no registers"

    def bind(self, served: Served) -> Session:
        Life.events.append("bound")
        return LineSession(served)

    def attach_lines(self, vdev: Vdev, path: Path) -> Sequence[tuple[str, str]]:
        return [("Lines", f"nc -U {path}")]


class LineSession:
    def __init__(self, served: Served) -> None:
        self.served = served

    def serve(self, connection: socket.socket) -> None:
        with connection.makefile("rw") as lines:
            for line in lines:
                lines.write(self.answer(line.strip()) + "\n")
                lines.flush()

    def answer(self, word: str) -> str:
        served = self.served
        if word == "use":
            served.used = True
        elif word == "memory":
            fd = os.memfd_create("client")
            os.ftruncate(fd, 0x1000)
            served.memory.replace([MemoryRegion.adopt(0, 0x1000, fd)])
        elif word == "read":
            assert served.function is not None
            return hex(served.function.bar_read(0, 0, 4))
        elif word == "bad":
            raise ClientError("it said bad")
        elif word == "boom":
            raise RuntimeError("a bug of the server")
        elif word == "files":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        elif word == "fault":
            served.fault(RuntimeError("a bug of the vdev"))
        elif word == "reset":
            served.reset()
        elif word == "end":
            served.vdev.ctx.request_shutdown("enough")
        return word


class OneServerHost(PluginHost):
    """Knows Lamp only."""

    def __init__(self) -> None:
        super().__init__(distributions=())

    def vdev_class(self, vdev_type: str) -> type[Vdev]:
        return Lamp

    def server_names(self) -> dict[str, EntryInfo]:
        return {"lines": EntryInfo("lines", "qvm.server.v1", "testing", "0")}


class Running:
    """A service on a thread; signals are put by hand."""

    def __init__(self, folder: Path, names: Sequence[str] = ("a",), plugins: Sequence[object] = ()) -> None:
        Life.events.clear()
        host = OneServerHost()
        for plugin in plugins:
            host.register(plugin)
        vdevs = tuple(VdevSpec("lamp", name, NoOptions()) for name in names)
        spec = MachineSpec("test", "", "auto", 1, (), LoadSpec(), vdevs)
        self.service = Service(spec, host, LineServer(), folder)
        self.folder = folder
        self.result: Any = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        while not self._ready.wait(0.01) and self._thread.is_alive():
            pass

    def _run(self) -> None:
        try:
            self.result = self.service.run(self._ready.set)
        except Exception as error:
            self.result = error

    def end(self) -> Any:
        self.service._events.put("SIGTERM")
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.result

    def client(self, name: str = "a") -> Client:
        return Client(self.folder / f"{name}.sock")


class Client:
    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.socket.settimeout(10)

    def say(self, word: str) -> str:
        try:
            self.socket.sendall(word.encode() + b"\n")
            return self.socket.recv(100).decode().strip()
        except ConnectionError:
            return ""

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    services: list[Running] = []

    def start(*args: Any, **more: Any) -> Running:
        services.append(Running(tmp_path / "s", *args, **more))
        return services[-1]

    threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield start
    for service in services:
        if service._thread.is_alive():
            service.end()
    until(lambda: threading.active_count() <= threads)
    until(lambda: len(os.listdir("/proc/self/fd")) <= fds)


def until(condition: Callable[[], object]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError(f"never happened; events: {Life.events}")


BORN = ["configured", "bound", "starting"]
DIED = ["dma", "terminated"]


def test_a_client_that_used_the_vdev_ends_its_life_and_the_next_one_finds_a_new_one(run: Any) -> None:
    running = run()
    assert Life.events == BORN
    client = running.client()
    assert client.say("use") == "use"
    client.close()
    until(lambda: Life.events == BORN + DIED)
    second = running.client()
    assert second.say("read") == "0x17"
    assert Life.events == BORN + DIED + BORN
    second.close()
    assert running.end() is True
    assert Life.events == BORN + DIED + BORN + DIED
    assert not list(running.folder.iterdir())


def test_a_client_that_used_nothing_leaves_the_life_to_the_next(run: Any) -> None:
    running = run()
    for _ in range(50):
        running.client().close()
    client = running.client()
    assert client.say("read") == "0x17"
    client.close()
    assert Life.events == BORN


def test_memory_is_unmapped_after_the_termination_plan(run: Any) -> None:
    seen = []

    class Watch:
        @hookimpl
        def qvm_termination_callbacks(self, machine: Any) -> list[TerminationCallback]:
            look = lambda end: seen.append(machine.memory.contains(0, 0x1000) and machine.memory.read(0, 4))  # noqa: E731
            return [TerminationCallback("watch", Phase.RELEASE, look)]

    running = run(plugins=[Watch()])
    client = running.client()
    client.say("memory")
    client.say("use")
    life = running.service._posts[0].life
    client.close()
    until(lambda: seen)
    assert seen == [b"\0\0\0\0"]
    until(lambda: life.memory.regions[0].fd < 0)


def test_a_vdev_that_is_not_quiet_keeps_the_memory_and_serves_no_more(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck:
        @hookimpl
        def qvm_termination_callbacks(self, machine: Any) -> list[TerminationCallback]:
            return [TerminationCallback("stuck", Phase.STOP_DMA, lambda end: time.sleep(3), 0.05)]

    running = run(plugins=[Stuck()])
    client = running.client()
    client.say("memory")
    client.say("use")
    region = running.service._posts[0].life.memory.regions[0]
    client.close()
    until(lambda: "was not proven quiet" in caplog.text)
    assert region.fd >= 0
    late = running.client()
    assert late.say("read") == ""
    late.close()
    assert running.end() is False
    region.close()


def test_a_second_client_is_turned_away_while_the_first_is_there(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    running = run()
    first = running.client()
    assert first.say("read") == "0x17"
    second = running.client()
    assert second.say("read") == ""
    assert "a second client was turned away" in caplog.text
    assert first.say("read") == "0x17"
    first.close()
    second.close()


def test_a_client_may_come_back_at_once(run: Any) -> None:
    running = run()
    for _ in range(20):
        client = running.client()
        assert client.say("use") == "use"
        client.close()


@pytest.mark.parametrize(
    ("word", "logged"),
    [
        ("bad", "connection closed: it said bad"),
        ("boom", "the server failed"),
        ("files", "connection closed: out of file descriptors; this process may have"),
        ("end", "asked for an end"),
    ],
)
def test_one_bad_connection_leaves_the_others_alone(
    run: Any, caplog: pytest.LogCaptureFixture, word: str, logged: str
) -> None:
    caplog.set_level("INFO")
    running = run(["a", "b"])
    other = running.client("b")
    assert other.say("read") == "0x17"
    client = running.client("a")
    client.say(word)
    until(lambda: client.say("read") == "")
    client.close()
    assert logged in caplog.text
    assert other.say("read") == "0x17"
    again = running.client("a")
    assert again.say("read") == "0x17"
    other.close()
    again.close()


def test_a_vdev_that_failed_is_new_for_the_next_client(run: Any) -> None:
    running = run()
    client = running.client()
    client.say("fault")
    assert client.say("read") == "0xffffffff"
    client.close()
    again = running.client()
    assert again.say("read") == "0x17"
    again.close()


def test_a_reset_reaches_the_vdev_and_its_function(run: Any) -> None:
    running = run()
    client = running.client()
    function = running.service._posts[0].life.function
    function.config_write(4, 2, 0x6)
    assert client.say("reset") == "reset"
    assert function.config_read(4, 2) == 0
    assert Life.events[-1] == "reset"
    client.close()


@pytest.mark.parametrize(
    ("broken", "logged"),
    [
        ("configured", "cannot be served: no bulb"),
        ("files", "cannot be served: out of file descriptors; this process may have"),
    ],
)
def test_a_vdev_that_cannot_be_made_again_turns_clients_away_until_it_can(
    run: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, broken: str, logged: str
) -> None:
    running = run()
    client = running.client()
    client.say("use")
    monkeypatch.setattr(Lamp, "broken", broken)
    client.close()
    refused = running.client()
    assert refused.say("read") == ""
    assert logged in caplog.text and "Traceback" not in caplog.text
    refused.close()
    monkeypatch.setattr(Lamp, "broken", "")
    again = running.client()
    until(lambda: again.say("read") == "0x17")
    again.close()


def test_a_vdev_that_cannot_be_made_at_first_refuses_the_start(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lamp, "broken", "configured")
    running = run()
    assert isinstance(running.result, HostError)
    assert "no bulb" in str(running.result)


def test_the_end_shuts_a_client_out_first(run: Any) -> None:
    running = run()
    client = running.client()
    client.say("use")
    assert running.end() is True
    assert client.say("read") == ""
    client.close()
    assert Life.events == BORN + DIED


def test_the_report_names_clients(run: Any) -> None:
    running = run(["a", "b"])
    client = running.client("b")
    assert client.say("read") == "0x17"
    report = running.service.report("x")
    assert report["state"] == "serving"
    assert report["engine"] == "lines"
    assert report["guest"]["status"] == {"clients": {"a": False, "b": True}}
    assert [row["name"] for row in report["vdevs"]] == ["a", "b"]
    client.close()


def test_a_dead_servers_socket_is_replaced_and_a_living_ones_is_not(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(str(folder / "a.sock"))
    stale.close()
    running = run()
    client = running.client()
    assert client.say("read") == "0x17"
    client.close()
    second = run()
    assert "served by another process" in str(second.result)
    again = running.client()
    assert again.say("read") == "0x17"
    again.close()


def test_a_file_in_the_place_of_the_socket_is_left_alone(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "a.sock").write_text("precious")
    running = run()
    assert "exists and is no socket" in str(running.result)
    assert (folder / "a.sock").read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_refused(run: Any) -> None:
    running = run(["a" * 108])
    assert "too long for the path of a socket" in str(running.result)
    assert Life.events == BORN + DIED


def test_signals_end_it_in_the_main_thread(tmp_path: Path) -> None:
    Life.events.clear()
    vdevs = (VdevSpec("lamp", "a", NoOptions()),)
    spec = MachineSpec("test", "", "auto", 1, (), LoadSpec(), vdevs)
    service = Service(spec, OneServerHost(), LineServer(), tmp_path / "s")
    old = signal.getsignal(signal.SIGTERM)
    assert service.run(lambda: os.kill(os.getpid(), signal.SIGTERM)) is True
    assert signal.getsignal(signal.SIGTERM) is old
    assert not list((tmp_path / "s").iterdir())


def test_what_the_user_says_of_polling_reaches_the_vdev_and_its_server(tmp_path: Path) -> None:
    vdevs = (VdevSpec("lamp", "a", NoOptions()),)
    spec = MachineSpec("test", "", "auto", 1, (), LoadSpec(), vdevs)
    service = Service(spec, OneServerHost(), LineServer(), tmp_path / "s", 0.00005)
    seen = []

    def look() -> None:
        life = service._posts[0].life
        assert life is not None
        seen.append((life.poll, life.slot.worker._poll_ns))
        service._events.put("SIGTERM")

    assert service.run(look) is True
    assert seen == [(0.00005, 50_000)]
