"""Run directories: made, found, numbered, and cleaned up however a VM ended."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qvmcore import rundir
from qvmcore.errors import HostError
from qvmcore.rundir import RunDirectory

HOLD = """
import sys, time
from qvmcore.rundir import RunDirectory
print(RunDirectory.create("vm").name, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory of the test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "qvm"


def names() -> list[str]:
    return [vm.name for vm in rundir.running()]


def test_a_vm_has_a_private_directory_while_it_runs(place: Path) -> None:
    assert rundir.running() == []
    directory = RunDirectory.create("vm")
    assert (directory.name, directory.path) == ("vm", place / "vm")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (place, place / "vm")] == [0o700, 0o700]
    (vm,) = rundir.running()
    assert (vm.name, vm.pid, vm.path) == ("vm", os.getpid(), place / "vm")
    directory.close()
    directory.close()
    assert list(place.iterdir()) == []
    assert rundir.running() == []


def test_vms_of_one_name_are_numbered_and_a_free_number_is_used_again(place: Path) -> None:
    held = [RunDirectory.create("vm") for _ in range(3)]
    assert [directory.name for directory in held] == ["vm", "vm.2", "vm.3"] == names()
    held[1].close()
    again = RunDirectory.create("vm")
    assert again.name == "vm.2"
    for directory in (*held, again):
        directory.close()
    assert names() == []


def test_vms_that_start_at_the_same_time_get_names_of_their_own(place: Path) -> None:
    held: list[RunDirectory] = []
    begin = threading.Barrier(16)

    def start() -> None:
        begin.wait()
        held.append(RunDirectory.create("vm"))

    threads = [threading.Thread(target=start) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {directory.name for directory in held} == {"vm", *(f"vm.{number}" for number in range(2, 17))}
    assert len(names()) == 16
    for directory in held:
        directory.close()


def test_no_name_leads_out_of_the_run_directory(place: Path) -> None:
    for name, taken in (
        ("../../x", "______x"),
        ("..", "__"),
        ("", "vm"),
        ("a" * 300, "a" * 64),
        ("ä b", "__b"),
    ):
        directory = RunDirectory.create(name)
        assert directory.path == place / taken
        directory.close()


def test_kill_9_leaves_a_directory_that_the_next_vm_takes_over(place: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "vm\n"
        (vm,) = rundir.running()
        assert vm.pid == process.pid
        other = RunDirectory.create("vm")
        assert other.name == "vm.2"
        other.close()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (place / "vm" / "pid").exists()
    directory = RunDirectory.create("vm")
    assert directory.name == "vm"
    assert (place / "vm" / "pid").read_text() == f"{os.getpid()}\n"
    directory.close()


def test_what_a_dead_vm_left_is_removed_by_who_looks(place: Path) -> None:
    stale = place / "vm"
    stale.mkdir(parents=True, mode=0o700)
    place.chmod(0o700)
    (stale / "pid").write_text("12345\n")
    (stale / "control").write_text("")
    assert names() == []
    assert not stale.exists()


def test_files_of_the_user_survive(place: Path) -> None:
    directory = RunDirectory.create("vm")
    (place / "vm" / "notes").write_text("mine")
    (place / "file").write_text("mine")
    assert names() == ["vm"]
    directory.close()
    assert names() == []
    assert (place / "vm" / "notes").read_text() == (place / "file").read_text() == "mine"
    assert RunDirectory.create("vm").name == "vm"


def test_a_link_in_the_place_of_a_directory_is_not_followed(place: Path, tmp_path: Path) -> None:
    place.mkdir(mode=0o700)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "pid").write_text("mine")
    (place / "vm").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="cannot make a run directory"):
        RunDirectory.create("vm")
    assert names() == []
    assert (tmp_path / "elsewhere" / "pid").read_text() == "mine"


def test_a_run_directory_that_is_a_link_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="cannot use the run directory"):
        RunDirectory.create("vm")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_run_directory_open_to_others_is_refused(place: Path) -> None:
    place.mkdir()
    place.chmod(0o770)
    with pytest.raises(HostError, match=f"open to other users; chmod 700 {place}"):
        RunDirectory.create("vm")


def test_a_run_directory_of_another_user_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mkdir(mode=0o700)
    own = os.geteuid()
    monkeypatch.setattr(rundir, "base", lambda: place)
    monkeypatch.setattr("os.geteuid", lambda: own + 1)
    with pytest.raises(HostError, match=rf"belongs to another user \(uid {own}\); set XDG_RUNTIME_DIR"):
        RunDirectory.create("vm")


def test_somebody_who_holds_the_lock_stops_nobody_for_long(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "LOCK_PATIENCE", 0.05)
    place.mkdir(mode=0o700)
    fd = os.open(place, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(HostError, match="stays locked by another process"):
        RunDirectory.create("vm")
    os.close(fd)


def test_a_vm_that_ends_while_its_name_is_taken_is_not_shared(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is removed between the look at it and the lock: the lock is on nothing."""
    first = RunDirectory.create("vm")
    lock = rundir._try_lock
    calls: list[int] = []

    def try_lock(fd: int) -> bool:
        calls.append(fd)
        if len(calls) == 2:  # the first is the directory above
            first.close()
        return lock(fd)

    monkeypatch.setattr(rundir, "_try_lock", try_lock)
    second = RunDirectory.create("vm")
    assert second.path.is_dir()
    assert names() == [second.name]
    second.close()


@pytest.mark.parametrize("given", ["", "relative", "/nonexistent"])
def test_without_a_usable_xdg_directory_there_is_a_fallback(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", given)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert rundir.base() == Path("/run/qvm")
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    assert rundir.base() == Path("/tmp/qvm-1234")


def test_the_xdg_directory_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rundir.base() == tmp_path / "qvm"
    own = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: own + 1)
    assert rundir.base() == Path(f"/tmp/qvm-{own + 1}")
