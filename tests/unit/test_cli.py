"""The command line: what each command prints, its exit code, and that nobody sees a traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import fdt
import importlib_metadata
import pytest

from qvmcore import machine
from qvmcore.cli import main
from qvmcore.errors import EngineError, HostError
from qvmcore.plugins import PluginHost
from qvmcore.types import GuestEnd, Reason
from tests.unit.vmfiles import BASE, DISK, write_files

PLUGIN = '''
import click
from tests.unit.vmfiles import CLASSES

def qvm_vdev_types():
    return list(CLASSES.values())

class Engine:
    name = "emulated"
    native = False
    def unusable(self, arch):
        return ""

def qvm_engines():
    return [Engine]

@click.group()
def guest():
    """Build guests."""

@guest.command()
def build():
    """Build one."""
    click.echo("built")

def qvm_cli_commands(register):
    register("guest", guest)
'''

ENTRY_POINTS = """\
[qvm.vdev.v1]
disk = fake_qvm_plugin
net = fake_qvm_plugin
pl011 = fake_qvm_plugin
pl061 = fake_qvm_plugin
silent = fake_qvm_plugin
[qvm.engine.v1]
emulated = fake_qvm_plugin
[qvm.command.v1]
guest = fake_qvm_plugin
"""

Run = Callable[..., "Result"]


class Result:
    """What one command did."""

    def __init__(self, code: int, raw: bytes, err: str) -> None:
        self.code, self.raw, self.err = code, raw, err

    @property
    def out(self) -> str:
        """Standard output as text."""
        return self.raw.decode()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with one installed plugin distribution."""
    folder = tmp_path / "site"
    info = folder / "qvm_fake-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qvm-fake\nVersion: 1.2\nSummary: fakes\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "fake_qvm_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("fake_qvm_plugin", None)


def _host(site: Path) -> PluginHost:
    info = site / "qvm_fake-1.2.dist-info"
    return PluginHost([importlib_metadata.PathDistribution(info)])


@pytest.fixture
def run(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: Any) -> Run:
    """Run one command in the folder of the VM files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QVM_DEBUG", raising=False)
    write_files(tmp_path, {"vm.toml": BASE + DISK})

    def call(*args: str) -> Result:
        host = _host(site)
        code = main(args, host=host)
        out, err = capsysbinary.readouterr()
        return Result(code, out, err.decode())

    return call


def test_version_and_help(run: Run) -> None:
    version = run("--version")
    assert (version.code, version.out) == (0, "qvm 0.1.0\n")
    text = run("--help").out
    for word in ("run", "check", "show", "plugins", "vdev", "fdt", "completion", "Exit codes"):
        assert word in text
    for command in ("run", "check", "show", "plugins", "vdev", "fdt", "completion"):
        result = run(command, "--help")
        assert result.code == 0
        assert f"qvm {command}" in result.out


def test_listing_help_imports_no_plugin(run: Run) -> None:
    text = run("--help").out
    assert "Commands of plugins" in text
    assert "fakes" in text
    assert "fake_qvm_plugin" not in sys.modules


def test_a_plugins_command(run: Run) -> None:
    assert run("guest", "build").out == "built\n"


def test_a_broken_plugins_command_is_one_line(run: Run, site: Path) -> None:
    (site / "fake_qvm_plugin.py").write_text("import no_such_module\n")
    assert run("--help").code == 0
    result = run("guest", "build")
    assert result.code == 64
    assert result.err.startswith("qvm: command 'guest' (qvm-fake 1.2) cannot be used: ModuleNotFoundError")
    assert result.err.count("\n") == 1


def test_unknown_commands_and_options(run: Run) -> None:
    result = run("chekc")
    assert result.code == 64
    assert "no such command 'chekc'; did you mean 'check'?" in result.err
    assert run("run").code == 64
    assert run("run", "--nonsense", "vm.toml").code == 64


def test_an_uninstalled_command_says_what_brings_it(run: Run, site: Path) -> None:
    (site / "qvm_fake-1.2.dist-info" / "entry_points.txt").write_text("")
    result = run("guest")
    assert result.code == 64
    assert "no such command 'guest'; it comes with qvm-guests: pip install qvm-guests" in result.err


def test_check(run: Run) -> None:
    result = run("check", "vm.toml")
    assert result.code == 0
    assert result.out == (
        "vm.toml: ok: arm64-virt, 1 CPU, 64M, vdevs: uart0 (pl011), gpio0 (pl061), disk0 (disk)\n"
    )


def test_a_wrong_vm_file_is_65_with_every_problem(run: Run, tmp_path: Path) -> None:
    (tmp_path / "vm.toml").write_text(BASE.replace("board", "bord") + DISK.replace("hostdev", "hotdev"))
    for command in ("run", "check", "show", "fdt"):
        result = run(command, "vm.toml")
        assert result.code == 65
        assert result.err.splitlines() == [
            "vm.toml:1: system: missing key 'board'; known boards: arm64-virt, x86_64-pc",
            "vm.toml:2: system: unknown key 'bord'; did you mean 'board'?",
            "vm.toml:6: vdev[0] (disk): missing key 'hostdev'; expected a file path",
            "vm.toml:11: vdev[0] (disk): unknown key 'hotdev'; did you mean 'hostdev'?",
        ]


def test_set_is_an_override(run: Run) -> None:
    assert "1G" in run("check", "vm.toml", "--set", "system.ram=1G").out
    result = run("check", "vm.toml", "--set", "system.rm=1G")
    assert result.code == 65
    expected = "command line: --set system.rm=1G: system: unknown key 'rm'; did you mean 'ram'?\n"
    assert result.err == expected


def test_show(run: Run) -> None:
    text = run("show", "vm.toml").out
    for line in (
        "  0x1c0d0000  0x1c0d01ff  512 bytes  vdev        disk0",
        "  0x40000000  0x43ffffff  64M        ram         ram",
        "  gic:41     edge     disk0",
        "  disk0  disk   0x1c0d0000  gic:41  qvm-fake 1.2  vm.toml:6",
        "  uart0  pl011  0x9000000   gic:33  qvm-fake 1.2  the board",
    ):
        assert line in text.splitlines()


def test_show_json(run: Run) -> None:
    data = json.loads(run("show", "vm.toml", "--json").out)
    assert data["vdevs"][2] == {
        "name": "disk0", "type": "disk", "loc": 0x1C0D0000, "pci": None, "intr": "gic:41",
        "on_fault": "isolate", "implicit": False, "space": "mem",
        "distribution": "qvm-fake", "version": "1.2", "source": "vm.toml:6",
    }  # fmt: skip
    ram = {"start": 0x40000000, "end": 0x44000000, "size": 64 << 20, "kind": "ram", "owner": "ram"}
    assert ram in data["memory"]
    assert {"intr": "gic:41", "trigger": "edge", "owner": "disk0"} in data["interrupts"]
    assert data["pci"] == []


def test_plugins(run: Run, site: Path) -> None:
    result = run("plugins")
    assert result.code == 0
    assert "  vdev     disk      qvm-fake  1.2      ok" in result.out.splitlines()
    rows = json.loads(run("plugins", "--json", "--load").out)
    assert {row["name"]: row["problem"] for row in rows}["disk"] == ""
    sys.modules.pop("fake_qvm_plugin")
    (site / "fake_qvm_plugin.py").write_text("import no_such_module\n")
    result = run("plugins", "--load")
    assert result.code == 64
    assert "ModuleNotFoundError: No module named 'no_such_module'" in result.out


def test_vdev_types(run: Run) -> None:
    assert "  disk    qvm-fake 1.2  a disk" in run("vdev").out.splitlines()
    assert {row["type"] for row in json.loads(run("vdev", "--json").out)} >= {"disk", "net"}


def test_vdev_options(run: Run) -> None:
    text = run("vdev", "disk").out
    assert text.startswith("disk (qvm-fake 1.2): a disk\n")
    rows = [line.split() for line in text.splitlines()]
    assert ["hostdev", "a", "file", "path", "required"] in rows
    assert "from 512 bytes to 4K" in text
    assert "on-fault" in text
    data = json.loads(run("vdev", "disk", "--json").out)
    assert [option["name"] for option in data["options"]] == ["hostdev", "read-only", "block-size"]
    result = run("vdev", "dsk")
    assert (result.code, result.err) == (64, "qvm: unknown vdev type 'dsk'; did you mean 'disk'?\n")


def test_fdt(run: Run, tmp_path: Path) -> None:
    assert run("fdt", "vm.toml", "-o", "vm.dtb").code == 0
    tree = fdt.parse_dtb((tmp_path / "vm.dtb").read_bytes())
    assert tree.exist_node("/virtio@1c0d0000")
    assert run("fdt", "vm.toml").raw[:4] == b"\xd0\x0d\xfe\xed"
    result = run("fdt", "vm.toml", "-o", "no/where")
    assert (result.code, result.err) == (64, "qvm: cannot write no/where: No such file or directory\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(run: Run, shell: str) -> None:
    assert "_QVM_COMPLETE" in run("completion", shell).out


def test_completion_of_vdev_types_and_engines(run: Run, site: Path) -> None:
    from qvmcore.cli.params import complete_engines, complete_vdev_types
    from qvmcore.cli.state import State

    state = State(_host(site))
    context = click.Context(click.Command("x"), obj=state)
    parameter = click.Argument(["x"])
    assert [item.value for item in complete_vdev_types(context, parameter, "p")] == ["pl011", "pl061"]
    assert [item.value for item in complete_engines(context, parameter, "")] == ["auto", "emulated"]


def test_completion_end_to_end() -> None:
    script = "import sys; from qvmcore.cli import main; sys.exit(main())"
    environment = {"_QVM_COMPLETE": "bash_complete", "COMP_WORDS": "qvm che", "COMP_CWORD": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "plain,check\n"


# -- run -----------------------------------------------------------------------------------------


class FakeMachine:
    """Stands in for Machine: ends as the test says."""

    result: Any = None
    started = True

    @classmethod
    def build(cls, spec: object, host: object) -> FakeMachine:
        return cls()

    def run(self) -> machine.Outcome:
        if isinstance(self.result, BaseException):
            raise self.result
        return machine.Outcome(self.result, (), True)


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(machine, "Machine", FakeMachine)

    def end(result: object, *, started: bool = True) -> None:
        monkeypatch.setattr(FakeMachine, "result", result)
        monkeypatch.setattr(FakeMachine, "started", started)

    return end


@pytest.mark.parametrize("reason", list(Reason))
def test_run_gives_the_exit_code_of_the_end(run: Run, ending: Callable[..., None], reason: Reason) -> None:
    ending(GuestEnd(reason, "so it is"))
    result = run("run", "vm.toml")
    assert result.code == reason.exit_code
    assert result.err == f"qvm: ended: {reason}: so it is\n"


def test_run_errors_before_and_after_the_start(run: Run, ending: Callable[..., None]) -> None:
    ending(EngineError("no CPU left", hint="buy one"), started=False)
    result = run("run", "vm.toml")
    assert (result.code, result.err) == (64, "qvm: no CPU left; buy one\n")
    ending(EngineError("the CPU melted"))
    assert run("run", "vm.toml").code == 96


def test_an_unexpected_exception_is_one_line(
    run: Run, ending: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ending(RuntimeError("boom"), started=False)
    result = run("run", "vm.toml")
    assert result.code == 64
    assert result.err == (
        "qvm: internal error: RuntimeError: boom; run it again with --debug to see where, "
        "and please report it\n"
    )
    for arguments in (("--debug", "run", "vm.toml"), ("run", "--debug", "vm.toml")):
        assert "Traceback" in run(*arguments).err
    monkeypatch.setenv("QVM_DEBUG", "1")
    assert "Traceback" in run("run", "vm.toml").err


def test_too_few_file_descriptors_are_no_internal_error(
    run: Run, ending: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However deep it was found, and whatever was made of it on the way up."""
    monkeypatch.setattr("resource.getrlimit", lambda which: (256, 4096))
    limit = (
        "; this process may have 256 (hard limit 4096): raise that with ulimit -n in its shell, "
        "or LimitNOFILE= in its systemd unit\n"
    )
    none_left = OSError(errno.EMFILE, "Too many open files")
    ending(none_left, started=False)
    result = run("run", "vm.toml")
    assert (result.code, result.err) == (64, "qvm: out of file descriptors" + limit)
    ending(none_left)
    assert run("run", "vm.toml").code == 96
    ending(_from(ImportError("no arm64 core"), none_left), started=False)
    assert run("run", "vm.toml").err == "qvm: out of file descriptors" + limit
    ending(_from(HostError("cannot open disk.img: Too many open files"), none_left), started=False)
    assert run("run", "vm.toml").err == "qvm: cannot open disk.img: Too many open files" + limit
    ending(_from(HostError("no fd is left", hint="do this"), none_left), started=False)
    assert run("run", "vm.toml").err == "qvm: no fd is left; do this\n"
    ending(OSError(errno.ENFILE, "Too many open files in system"), started=False)
    assert run("run", "vm.toml").err == (
        "qvm: too many files are open on this host; end other programs, or raise its limit "
        "with sysctl fs.file-max\n"
    )
    ending(OSError(errno.EIO, "Input/output error"), started=False)
    assert "internal error: OSError" in run("run", "vm.toml").err
    assert "Traceback" in run("run", "--debug", "vm.toml").err


def _from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_interrupt_outside_of_a_machine(run: Run, ending: Callable[..., None]) -> None:
    ending(KeyboardInterrupt())
    assert run("run", "vm.toml").code == 130


def test_engine_option(run: Run) -> None:
    result = run("run", "vm.toml", "--engine", "emulatd")
    assert result.code == 65
    assert "unknown engine 'emulatd'; did you mean 'emulated'?" in result.err


def test_when_no_engine_can_run_the_guest_each_is_named_and_it_is_64(run: Run, site: Path) -> None:
    plugin = site / "fake_qvm_plugin.py"
    plugin.write_text(plugin.read_text().replace('return ""', 'return f"no {arch} here; buy one"'))
    result = run("run", "vm.toml")
    assert result.code == 64
    assert result.err.splitlines() == [
        "qvm: no engine can run this aarch64 guest:",
        "  emulated: no aarch64 here; buy one",
        "  kvm: not installed; pip install qvm-kvm",
    ]
    result = run("run", "vm.toml", "--engine", "emulated")
    assert result.code == 64
    assert result.err == "qvm: engine 'emulated' cannot run this aarch64 guest: no aarch64 here; buy one\n"


def test_quiet_verbose_and_log_file(run: Run, ending: Callable[..., None], tmp_path: Path) -> None:
    ending(GuestEnd(Reason.GUEST_SHUTDOWN))
    assert run("run", "-q", "vm.toml").err == ""
    assert run("-q", "run", "--log-file", "log.txt", "vm.toml").err == ""
    assert (tmp_path / "log.txt").read_text().endswith("INFO qvm: ended: guest-shutdown\n")
    result = run("run", "--log-file", "no/log.txt", "vm.toml")
    text = "qvm: cannot write the log file no/log.txt: No such file or directory\n"
    assert (result.code, result.err) == (64, text)


def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys; from qvmcore.cli import main; sys.exit(main(['--help']))"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    # click ends a command whose reader is gone, silently and with 1.
    assert (done.returncode, done.stderr) == (1, "")


def test_importing_qvmcore_is_cheap() -> None:
    heavy = "{'click', 'rich', 'pluggy', 'msgspec', 'tomli'}"
    code = f"import sys, qvmcore; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help_does_not_import_rich() -> None:
    code = "import sys; from qvmcore.cli import main; main(['show', '-h']); sys.exit('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0
