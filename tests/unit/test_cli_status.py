"""``qvm status`` and ``qvm doctor``: what they print, their exit codes, and never a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from qvmcore import control, rundir
from qvmcore.cli import main
from qvmcore.control import ControlServer
from qvmcore.errors import PluginError
from qvmcore.plugins import PluginHost
from tests.unit.test_choose import EngineHost, FakeEngine

REPORT = {
    "name": "vm",
    "vm": "vm",
    "pid": 4711,
    "state": "running",
    "engine": "kvm",
    "board": "x86_64-pc",
    "cpus": 2,
    "ram": 512 << 20,
    "uptime": 3725.4,
    "guest": {"status": {"exits": {"mmio": 7, "io": 0}, "mode": "native"}, "problem": ""},
    "vdevs": [
        {"name": "disk0", "type": "virtio-blk", "fault": "", "guest_errors": 2,
         "status": {"reads": 5, "queues": [{"popped": 3}, {}, {"popped": 4}], "cpus": [1, 2]},
         "problem": ""},
        {"name": "net0", "type": "virtio-net", "fault": "OSError: gone", "guest_errors": 0,
         "status": {"peer": "\x1b[2Jx\n"}, "problem": ""},
        {"name": "slow", "type": "x", "fault": "", "guest_errors": 0, "status": {},
         "problem": "status() did not return within 1 s"},
    ],
}  # fmt: skip

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """Run one command with the given engines, and a run directory of the test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("QVM_DEBUG", raising=False)

    def call(*args: str, host: PluginHost | None = None) -> tuple[int, str, str]:
        code = main(args, host=host or EngineHost())
        out, err = capsys.readouterr()
        return code, out, err

    return call


def vm(name: str = "vm", **changes: object) -> ControlServer:
    return ControlServer(name, lambda taken: {**REPORT, "name": taken, **changes})


def test_status_without_vms(run: Run) -> None:
    assert run("status") == (0, "Running VMs: none\n", "")
    assert run("status", "--json") == (0, "[]\n", "")


def test_status_lists_the_vms(run: Run) -> None:
    with vm(), vm():
        code, out, _ = run("status")
        listed = json.loads(run("status", "--json")[1])
    pid = os.getpid()
    assert code == 0
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["name", "pid", "state", "engine", "board", "cpus", "ram", "uptime"],
        ["vm", f"{pid}", "running", "kvm", "x86_64-pc", "2", "512M", "1:02:05"],
        ["vm.2", f"{pid}", "running", "kvm", "x86_64-pc", "2", "512M", "1:02:05"],
    ]
    assert listed[0] == {
        "name": "vm", "pid": pid, "state": "running", "engine": "kvm", "board": "x86_64-pc", "cpus": 2,
        "ram": 512 << 20, "uptime": 3725.4, "problem": "",
    }  # fmt: skip


def test_status_lists_a_vm_that_does_not_answer_with_the_reason(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "ASK_PATIENCE", 0.1)
    directory = rundir.RunDirectory.create("mute")
    with vm():
        code, out, _ = run("status")
    directory.close()
    assert code == 0
    assert out.splitlines()[2].split() == ["mute", f"{os.getpid()}", "no", "answer"]
    assert out.splitlines()[3].split()[:3] == ["vm", f"{os.getpid()}", "running"]
    assert out.splitlines()[4] == ("cannot ask mute: No such file or directory; it may be starting or ending")


def test_status_of_one_vm(run: Run) -> None:
    with vm():
        code, out, err = run("status", "vm")
        by_pid = run("status", str(os.getpid()), "--json")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "vm: running, x86_64-pc, engine kvm, 2 CPU, 512M, pid 4711, up 1:02:05",
        "",
        "Guest:",
        "  counter     value",
        "  exits.mmio  7",
        "  exits.io    0",
        "  mode        native",
        "Vdevs:",
        "  name   type        state                               guest errors",
        "  disk0  virtio-blk  ok                                  2",
        "  net0   virtio-net  FAILED: OSError: gone               0",
        "  slow   x           status() did not return within 1 s  0",
        "Status of the vdevs:",
        "  vdev   item             value",
        "  disk0  reads            5",
        "  disk0  queues.0.popped  3",
        "  disk0  queues.2.popped  4",
        "  disk0  cpus             [1, 2]",
        # What a guest or a peer chose cannot control the terminal.
        "  net0   peer             \\x1b[2Jx\\n",
    ]
    assert json.loads(by_pid[1]) == REPORT


def test_status_of_an_unknown_vm_is_64(run: Run, tmp_path: Path) -> None:
    with vm("router"):
        code, out, err = run("status", "ruoter")
    assert (code, out) == (64, "")
    assert err == (f"qvm: no running VM is called 'ruoter' (in {tmp_path}/qvm); did you mean 'router'?\n")


def test_an_answer_of_another_version_is_one_line(run: Run) -> None:
    for changes in ({"vdevs": 5}, {"guest": None}, {"vdevs": [{"name": "x"}]}):
        with vm(**changes):
            code, _, err = run("status", "vm")
            assert run("status", "vm", "--json")[0] == 0
            assert run("status")[0] == 0
        assert code == 64
        assert err.startswith("qvm: vm answers in another way than this qvm expects (")
        assert err.count("\n") == 1


def test_a_run_directory_of_no_use_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "qvm").mkdir()
    (tmp_path / "qvm").chmod(0o777)
    code, _, err = run("status")
    assert (code, err.count("\n")) == (64, 1)
    assert "open to other users; chmod 700" in err


def test_names_of_vms_are_completed(run: Run) -> None:
    from qvmcore.cli.status import status

    (argument,) = (each for each in status.params if each.name == "name")
    with vm("router"), vm("other"):
        found = argument.shell_complete(click.Context(status), "r")
    assert [item.value for item in found] == ["router"]


# -- doctor --------------------------------------------------------------------------------------


def test_doctor_names_every_engine_with_reason_and_fix(run: Run) -> None:
    host = EngineHost(
        emulated=FakeEngine("emulated"),
        mine=FakeEngine("mine", "no permission to open /dev/mine; join the group mine", native=True),
        broken=PluginError("engine 'broken' (qvm-broken 1) cannot be used: ImportError: x"),
    )
    code, out, err = run("doctor", host=host)
    assert (code, err) == (0, "")
    rows = [line.split(None, 4) for line in out.splitlines()]
    assert ["emulated", "aarch64", "qvm-emulated", "1", "ok"] in rows
    assert [
        "mine",
        "aarch64",
        "qvm-mine",
        "1",
        "no permission to open /dev/mine; join the group mine",
    ] in rows
    reason = "engine 'broken' (qvm-broken 1) cannot be used: ImportError: x"
    assert ["broken", "aarch64", "qvm-broken", "1", reason] in rows
    assert "not installed; pip install qvm-kvm" in out
    assert ["arm64-virt", "aarch64", "emulated"] in [line.split() for line in out.splitlines()]
    assert "Plugins that cannot be used: none" in out


def test_doctor_as_json(run: Run, tmp_path: Path) -> None:
    host = EngineHost(kvm=FakeEngine("kvm", native=True), emulated=FakeEngine("emulated", "no unicorn"))
    found = json.loads(run("doctor", "--json", host=host)[1])
    engines = [each for each in found["engines"] if each["arch"] == "aarch64"]
    assert engines == [
        {"engine": "kvm", "arch": "aarch64", "native": True, "package": "qvm-kvm 1", "problem": ""},
        {"engine": "emulated", "arch": "aarch64", "native": False, "package": "qvm-emulated 1",
         "problem": "no unicorn"},
    ]  # fmt: skip
    assert {"board": "arm64-virt", "arch": "aarch64", "engine": "kvm"} in found["boards"]
    assert found["run_directory"] == {"path": f"{tmp_path}/qvm", "problem": ""}
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert all(row["version"] for row in found["packages"])
    assert {"click", "msgspec", "pluggy"} <= {row["package"] for row in found["packages"]}


def test_doctor_is_64_when_nothing_can_run(run: Run) -> None:
    code, out, _ = run("doctor", host=EngineHost(kvm=FakeEngine("kvm", "no /dev/kvm", native=True)))
    assert code == 64
    assert ["arm64-virt", "aarch64", "none"] in [line.split() for line in out.splitlines()]
    assert run("doctor", host=EngineHost())[0] == 64


def test_doctor_names_missing_packages_broken_plugins_and_an_unusable_run_directory(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qvmcore.cli import doctor
    from qvmcore.plugins import EntryInfo

    (tmp_path / "qvm").mkdir()
    (tmp_path / "qvm").chmod(0o777)
    monkeypatch.setattr("importlib_metadata.requires", lambda name: ["no-such-thing>=1", "x; extra == 'y'"])
    monkeypatch.setattr(doctor, "_MEMINFO", tmp_path / "absent")

    class Host(EngineHost):
        def catalogue(self, *, load: bool = False) -> list[EntryInfo]:
            broken = EntryInfo("disk", "qvm.vdev.v1", "qvm-disk", "2", problem=f"broken, load={load}")
            return [broken, EntryInfo("net", "qvm.vdev.v1", "qvm-net", "2")]

    code, out, _ = run("doctor", host=Host(emulated=FakeEngine("emulated")))
    assert code == 0
    lines = [line.split(None, 4) for line in out.splitlines()]
    assert ["no-such-thing", "MISSING:", "no-such-thing>=1"] in lines
    assert ["vdev", "disk", "qvm-disk", "2", "broken, load=True"] in lines
    assert "qvm-net" not in out
    assert "open to other users; chmod 700" in out
    assert "Memory" not in out
