"""The rig's own part of this side: what it needs, what it is made of, whose results are whose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from qvm_guests.cache import Package

from tests.rig import image, machine, packages, payload
from tests.rig.inside import edu_guest, reporter
from tests.rig.inside.linux import vdev
from tests.rig.results import Results, Silence

PLENTY = "MemTotal: 99999999 kB\nMemAvailable:   16000000 kB\n"


def test_a_machine_with_everything_can_have_a_rig() -> None:
    assert machine.missing(PLENTY, lambda tool: f"/usr/bin/{tool}") == ""


def test_what_lacks_is_named_with_its_package() -> None:
    why = machine.missing(PLENTY, lambda tool: None if tool.startswith("qemu") else tool)
    assert why == "the rig needs qemu-system-x86_64 (Debian: qemu-system-x86)"


@pytest.mark.parametrize("meminfo", ["MemAvailable: 2000000 kB\n", ""])
def test_too_little_memory_is_told_in_figures(meminfo: str) -> None:
    why = machine.missing(meminfo, lambda tool: tool)
    assert why.startswith(f"the rig needs {machine.NEEDED} MiB of free memory, ")
    assert why.endswith(f" {2000000 >> 10 if meminfo else 0} MiB are available")


@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("1", "1 error")], ids=["at-home", "in-ci"])
def test_a_machine_without_the_tools_skips_with_the_reason_and_fails_in_ci(ci: str, outcome: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/rig/inside/test_host.py::test_a_vm_can_be_created"],
        cwd=payload.ROOT, env={"PATH": "/nowhere", "CI": ci}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome in done.stdout.splitlines()[-1], done.stdout
    assert "the rig needs qemu-system-x86_64 (Debian: qemu-system-x86)" in done.stdout
    assert done.returncode == (1 if ci else 0)


PYTHON = Package("python3", "3.11.2-1+b1", "amd64", "python3.deb", 10, "aa")
FIO = Package("fio", "3.33-3", "amd64", "fio.deb", 10, "bb")


def test_the_image_has_another_name_when_a_package_changes_and_only_then() -> None:
    assert image.key([PYTHON, FIO]) == image.key([FIO, PYTHON])
    names = {image.key([PYTHON]), image.key([PYTHON, FIO])}
    names |= {image.key([PYTHON, other]) for other in (replace(FIO, version="4"), replace(FIO, sha256="cc"))}
    assert len(names) == 4


def test_the_image_s_python_is_that_of_its_package() -> None:
    assert image.python_version([FIO, PYTHON]) == (3, 11)


def test_what_apt_plans_is_read_by_name() -> None:
    said = (
        "'http://x.example/libc6_2.36-9%2bdeb12u14_amd64.deb' libc6_2.36-9+deb12u14_amd64.deb 275 SHA256:1\n"
        "'http://x.example/libstdc++6_12_amd64.deb' libstdc++6_12_amd64.deb 612604 MD5Sum:2\n"
    )
    assert packages._PLANNED.findall(said) == ["libc6", "libstdc++6"]


def test_our_distributions_bring_their_plugins_into_the_machine(tmp_path: Path) -> None:
    """As entry points that qvm finds there, from the working tree, without those of pytest."""
    for folder, table in payload.projects():
        payload.install(folder, table, tmp_path)
    assert not (tmp_path / "qvm_guests").exists()
    found = {path.parent.name.split("-")[0]: path.read_text() for path in tmp_path.glob("*/entry_points.txt")}
    assert "[qvm.vdev.v1]\nvirtio-blk = qvm_virtio_blk\n" in found["qvm_virtio_blk"]
    assert "hello = " in found["qvm_hello"]
    assert "pytest11" not in "".join(found.values())
    listed = subprocess.run(
        [sys.executable, "-S", "-c", "import sys; from importlib.metadata import *; "
         "print(version('qvmcore'), [e.name for e in entry_points(group='qvm.engine.v1')])"],
        env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert listed == "0.1.0 ['emulated', 'kvm']\n"


def test_what_the_tests_need_is_found_with_its_dependencies() -> None:
    tables = [table for _, table in payload.projects()]
    found = payload.third_party(tables)
    assert {
        "pytest",
        "pluggy",
        "iniconfig",
        "msgspec",
        "tomli",
        "importlib-metadata",
        "fdt",
        "unicorn",
    } <= set(found)
    assert not {"qvmcore", "qvm-guests", "hypothesis"} & set(found)
    assert payload.compiled(found["msgspec"])
    assert not payload.compiled(found["pytest"])


def test_the_guest_with_edu_is_its_source_assembled(tmp_path: Path) -> None:
    prefix = "aarch64-linux-gnu-"
    if shutil.which(f"{prefix}as") is None:
        pytest.skip("no assembler for aarch64: apt-get install binutils-aarch64-linux-gnu")
    source = Path(edu_guest.__file__).with_suffix(".s")
    target, image = tmp_path / "guest.o", tmp_path / "guest.bin"
    subprocess.run([f"{prefix}as", "-o", target, source], check=True)
    subprocess.run([f"{prefix}objcopy", "-O", "binary", "-j", ".text", target, image], check=True)
    assert edu_guest.code() == image.read_bytes().rstrip(b"\0")


def test_a_vdev_is_written_as_toml() -> None:
    import tomllib

    text = vdev("virtio-blk", "disk0", loc=0xC0000000, intr="ioapic:16", readonly=True)
    assert tomllib.loads(text) == {
        "vdev": [
            {"type": "virtio-blk", "name": "disk0", "loc": 0xC0000000, "intr": "ioapic:16", "readonly": True}
        ]
    }


class Fake:
    """A machine whose lines a test writes; ``lives`` says how often it is asked until it is dead."""

    def __init__(self, results: Path, lives: int = 0) -> None:
        self.results = results
        self.lives = lives

    def alive(self) -> bool:
        self.lives -= 1
        return self.lives >= 0


def report(nodeid: str, when: str, outcome: str = "passed") -> dict[str, Any]:
    return {"report": {"nodeid": nodeid, "when": when, "outcome": outcome}}


def write(path: Path, *lines: dict[str, Any], rest: str = "") -> Fake:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)
    return Fake(path)


def whole(nodeid: str) -> list[dict[str, Any]]:
    return [report(nodeid, when) for when in ("setup", "call", "teardown")]


def test_reports_go_to_their_test_in_any_order(tmp_path: Path) -> None:
    results = Results(write(tmp_path / "r", *whole("b"), {"start": "a"}, *whole("a")), patience=9)
    assert [item["when"] for item in results.of("a")] == ["setup", "call", "teardown"]
    assert [item["nodeid"] for item in results.of("b")] == ["b"] * 3


def test_lines_are_taken_as_they_come_and_half_of_one_waits(tmp_path: Path) -> None:
    path = tmp_path / "r"
    line = json.dumps(report("a", "teardown")) + "\n"
    fake = write(path, report("a", "setup"), rest=line[:20])
    fake.lives = 100
    reports = Results(fake, patience=9).of("a", pause=0)
    assert next(reports)["when"] == "setup"
    with path.open("a") as stream:
        stream.write(line[20:])
    assert next(reports)["when"] == "teardown"
    assert list(reports) == []


def test_what_was_written_before_the_end_counts(tmp_path: Path) -> None:
    results = Results(write(tmp_path / "r", *whole("a"), {"end": 0}), patience=9)
    assert len(list(results.of("a"))) == 3
    with pytest.raises(Silence, match="ended without a result"):
        list(results.of("b"))


def test_a_machine_that_never_said_anything_is_told(tmp_path: Path) -> None:
    with pytest.raises(Silence, match="ended without a result"):
        list(Results(Fake(tmp_path / "none"), patience=9).of("a"))


def test_a_file_that_cannot_be_imported_there_is_the_reason(tmp_path: Path) -> None:
    fake = write(tmp_path / "r", {"broken": "test_x.py: no module named y"}, {"end": 2}, rest="garbage\n")
    with pytest.raises(Silence, match=r"(?s)no module named y.*not a result: b'garbage'"):
        list(Results(fake, patience=9).of("a"))


def test_a_machine_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    fake = write(tmp_path / "r", report("a", "setup"))
    fake.lives = 1000
    times = count(time.time(), 5)
    with pytest.raises(Silence, match="nothing was heard of the machine for 60 s"):
        list(Results(fake, patience=60, clock=lambda: next(times)).of("a", pause=0))


def test_silence_is_seen_by_who_looks_and_counts_from_the_last_word(tmp_path: Path) -> None:
    """Not from when it was read: the tests of this side may take many minutes."""
    fake = write(tmp_path / "r", *whole("a"), {"alive": True})
    fake.lives = 1000
    now = time.time()
    results = Results(fake, patience=60, clock=lambda: now)
    assert not results.quiet()
    now += 61
    assert results.quiet()
    assert results.silence() == ""  # something new was read
    assert results.silence() == "nothing was heard of the machine for 60 s"
    with (tmp_path / "r").open("a") as stream:
        stream.write('{"alive": true}\n')
    os.utime(tmp_path / "r", (now, now))
    assert results.silence() == results.silence() == ""


def test_another_machine_goes_on_with_the_test_that_has_no_result(tmp_path: Path) -> None:
    fake = write(tmp_path / "r", *whole("a"), report("b", "setup"), rest='{"rep')
    fake.lives = 1000
    results = Results(fake, patience=9)
    assert results.silence() == ""
    assert results.left(["a", "b", "c"]) == ["b", "c"]
    fake.results = tmp_path / "other"
    results.renew()
    write(fake.results, *whole("b"), *whole("c"), {"end": 0})
    assert [[each["when"] for each in results.of(nodeid)] for nodeid in "abc"] == [
        ["setup", "call", "teardown"]
    ] * 3
    assert results.left(["a", "b", "c"]) == []


def test_the_machine_says_that_it_is_alive_while_a_test_takes_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setattr(reporter, "BEAT", 0.01)
    port = tmp_path / "port"
    port.touch()
    there = reporter.Reporter(pytestconfig, str(port))
    deadline = time.monotonic() + 30
    while (text := port.read_text()).count("\n") < 3:
        assert time.monotonic() < deadline
    monkeypatch.setattr(reporter, "BEAT", 3600)
    assert all(json.loads(line)["alive"] for line in text.splitlines()[:3])
    there.say(end=0)
    assert '{"end": 0' in port.read_text()
