"""README and CONTRIBUTING say what is true: code, commands, hooks, paths, exit codes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import tomli
from click.testing import CliRunner

from qvmcore import hookspecs
from qvmcore.compose import compose
from qvmcore.errors import ConfigError
from qvmcore.plugins import PluginHost
from qvmcore.termination import Phase
from qvmcore.types import Reason

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def hooks() -> dict[str, list[str]]:
    """The specifications: name -> argument names."""
    return {
        name: list(inspect.signature(value).parameters)
        for name, value in vars(hookspecs).items()
        if name.startswith("qvm_") and inspect.isfunction(value)
    }


def test_the_hello_shown_is_the_hello_shipped() -> None:
    assert (ROOT / "examples/qvm_hello/qvm_hello.py").read_text() in blocks("python")
    assert (ROOT / "examples/qvm_hello/pyproject.toml").read_text() in blocks("toml")
    assert len((ROOT / "examples/qvm_hello/qvm_hello.py").read_text().splitlines()) <= 25


def test_the_first_vm_file_composes(tmp_path: Path) -> None:
    text = next(block for block in blocks("toml") if "[system]" in block)
    hello = next(block for block in blocks("toml") if 'type = "hello"' in block)
    (tmp_path / "vm.toml").write_text(text + hello)
    (tmp_path / "guest").mkdir()
    for name in ("guest/vmlinuz", "guest/initramfs.cpio.gz", "disk.img"):
        (tmp_path / name).write_bytes(bytes(512))
    spec = compose([tmp_path / "vm.toml"], [], PluginHost())
    assert [vdev.type for vdev in spec.vdevs if not vdev.implicit] == [
        "virtio-blk",
        "virtio-console",
        "hello",
    ]


def test_the_mistakes_shown_are_told_like_that(tmp_path: Path) -> None:
    vm = tmp_path / "vm.toml"
    vm.write_text(
        '[system]\nname = "x"\nboard = "arm64-vert"\n\n\n\n\n'
        '[[vdev]]\ntype = "virtio-blk"\nloc = 0x1c0d0000\nintr = "gic:41"\nhostdevv = "x"\n'
    )
    with pytest.raises(ConfigError) as caught:
        compose([vm], [], PluginHost())
    told = {re.sub(r"^.*/vm\.toml", "vm.toml", str(item)) for item in caught.value.diagnostics}
    shown = next(block for block in blocks("text") if "arm64-vert" in block).splitlines()
    assert set(shown[:2]) <= told


def test_every_hook_is_shown_with_its_arguments() -> None:
    shown = dict(re.findall(r"^\| `(qvm_\w+)\(([^)]*)\)`", README, re.MULTILINE))
    assert {name: ", ".join(arguments) for name, arguments in hooks().items()} == shown


def test_every_hook_has_an_implementation_in_the_repository() -> None:
    sources = [
        path.read_text()
        for folder in ("qvmcore", "plugins", "tests", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "hookspecs.py"
    ]
    for name in hooks():
        assert any(re.search(rf"@hookimpl[^\n]*\n\s*def {name}\(", text) for text in sources), name


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`qvm (\w+)", README))))
def test_every_command_named_exists_and_has_help(command: str) -> None:
    from qvmcore.cli.root import qvm
    from qvmcore.cli.state import State

    result = CliRunner().invoke(qvm, [command, "--help"], obj=State(None))
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_linked_files_exist(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
        assert (ROOT / target).exists(), f"{document} links to {target}"


def test_exit_codes_of_the_table_are_those_of_the_code() -> None:
    table = README.split("| exit code | meaning |")[1].split("\n\n")[0]
    shown = {
        int(number)
        for row in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
        for number in row.split(",")
    }
    in_code = {reason.exit_code for reason in Reason}
    # 4 is a watchdog's, which is not built; 64 and 65 are not ends of a running guest.
    assert shown - {64, 65} == in_code - {4}


def test_the_phases_named_are_the_phases() -> None:
    assert ", ".join(phase.name for phase in Phase) in README.replace("\n", " ")


def test_every_distribution_is_listed_and_extras_name_them() -> None:
    projects = [ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")]
    names = {tomli.loads(path.read_text())["project"]["name"] for path in projects}
    table = README.split("| distribution | brings |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(qvm[\w-]+)`", table)) >= names
    root = tomli.loads((ROOT / "pyproject.toml").read_text())
    extra = {entry.split("==")[0] for entry in root["project"]["optional-dependencies"]["standard"]}
    assert extra == names - {"qvmcore", "qvm-chardev", "qvm-vfio"}


def test_the_floors_of_contributing_are_those_of_the_check() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    check = (ROOT / "tests/unit/test_floors.py").read_text()
    for path in (ROOT / "qvmcore").iterdir():
        name = path.name.removesuffix(".py")
        if name.startswith("_") or name in ("py.typed", "testing"):
            continue
        assert f'"{name}"' in check
        assert re.search(rf"`{name}/?`", text), f"CONTRIBUTING.md does not place {name}"
