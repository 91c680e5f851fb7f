"""Discovery: entry points, API versions, conflicts, broken plugins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import importlib_metadata
import pytest

from qvmcore.errors import PluginError
from qvmcore.plugins import PluginHost
from qvmcore.vdev import Vdev

GOOD = """
from qvmcore.api import Vdev, hookimpl
class Thing(Vdev):
    vdev_type = "{type}"
    api = {api}
@hookimpl
def qvm_vdev_types():
    return [Thing]
"""


class Site:
    """A folder of made-up distributions."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        monkeypatch.syspath_prepend(str(path))

    def add(
        self, dist: str, code: str, *, entry: str, group: str = "qvm.vdev.v1", version: str = "1.0"
    ) -> None:
        module = dist.replace("-", "_")
        (self.path / f"{module}.py").write_text(code)
        info = self.path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\nSummary: a thing\n"
        )
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry} = {module}\n")

    def host(self) -> PluginHost:
        return PluginHost(importlib_metadata.distributions(path=[str(self.path)]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def good(vdev_type: str, api: tuple[int, int] = (1, 0)) -> str:
    return GOOD.format(type=vdev_type, api=api)


def test_metadata_names_a_type_without_importing_it(site: Site) -> None:
    site.add("dist-lazy", "raise SystemExit('imported')", entry="lazy")
    info = site.host().vdev_types()["lazy"]
    assert (info.origin, info.kind, info.summary, info.problem) == ("dist-lazy 1.0", "vdev", "a thing", "")
    assert "dist_lazy" not in sys.modules


def test_a_distribution_without_a_summary_is_as_good(site: Site) -> None:
    site.add("dist-lazy", "", entry="lazy")
    for metadata in site.path.rglob("METADATA"):
        metadata.write_text(metadata.read_text().replace("Summary: a thing\n", ""))
    assert site.host().vdev_types()["lazy"].summary == ""


def test_a_named_type_is_loaded(site: Site) -> None:
    site.add("dist-named", good("named"), entry="named")
    cls = site.host().vdev_class("named")
    assert issubclass(cls, Vdev)
    assert cls.vdev_type == "named"


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (
            "virtio-blk",
            "unknown vdev type 'virtio-blk'; it comes with qvm-virtio-blk: pip install qvm-virtio-blk",
        ),
        ("virtio-blkk", "did you mean 'virtio-blk'? it comes with qvm-virtio-blk"),
        ("installd", "unknown vdev type 'installd'; did you mean 'installed'?"),
        ("zzz", "unknown vdev type 'zzz'; installed: installed"),
    ],
)
def test_unknown_type_says_the_nearest_name_and_what_brings_it(site: Site, asked: str, text: str) -> None:
    site.add("dist-installed", good("installed"), entry="installed")
    with pytest.raises(PluginError) as caught:
        site.host().vdev_class(asked)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import nosuchmodule_qvm", "ModuleNotFoundError: No module named 'nosuchmodule_qvm'"),
        ("1/0", "ZeroDivisionError: division by zero"),
        ("x = 1", "has no qvm_vdev_types()"),
        ("def qvm_vdev_types(): raise ValueError('no')", "qvm_vdev_types() raised ValueError: no"),
        (good("other"), "does not return a class with vdev_type = 'broken'"),
        (good("broken", (1, 99)), "needs plugin API 1.99, this qvm has 1.0; upgrade qvmcore"),
        ("class T: vdev_type='broken'\ndef qvm_vdev_types(): return [T]", "T is not a subclass of"),
        (
            good("broken") + "\n@hookimpl\ndef qvm_bind_mimo(vdev): pass\n",
            "PluginValidationError: unknown hook 'qvm_bind_mimo'",
        ),
    ],
)
def test_a_broken_plugin_is_named_with_the_reason_and_harms_nobody_else(
    site: Site, code: str, why: str
) -> None:
    site.add("dist-broken", code, entry="broken")
    site.add("dist-fine", good("fine"), entry="fine")
    host = site.host()
    with pytest.raises(PluginError) as caught:
        host.vdev_class("broken")
    message = str(caught.value)
    assert "vdev 'broken' (dist-broken 1.0) cannot be used: " in message
    assert why in message
    assert "pip install --force-reinstall dist-broken" in message
    assert host.vdev_class("fine").vdev_type == "fine"
    assert why in {row.name: row.problem for row in host.catalogue()}["broken"]
    sys.modules.pop("dist_broken", None)


def test_a_plugin_for_another_api_version_is_known_without_an_import(site: Site) -> None:
    site.add("dist-old", "raise SystemExit('imported')", entry="old", group="qvm.vdev.v0")
    host = site.host()
    with pytest.raises(PluginError, match=r"dist-old 1.0.*made for plugin API v0, this qvm has v1"):
        host.vdev_class("old")
    assert "API v0" in host.catalogue()[0].problem


def test_a_type_from_two_distributions_is_an_error_that_names_both(site: Site) -> None:
    site.add("dist-a", good("twice"), entry="twice")
    site.add("dist-b", good("twice"), entry="twice", version="2.0")
    host = site.host()
    with pytest.raises(PluginError) as caught:
        host.vdev_class("twice")
    assert "dist-a 1.0" in str(caught.value)
    assert "dist-b 2.0" in str(caught.value)
    assert [row.problem.startswith("duplicate") for row in host.catalogue()] == [True, True]


def test_catalogue_with_load_finds_what_is_broken(site: Site) -> None:
    site.add("dist-bad", "1/0", entry="bad")
    site.add("dist-ok", good("ok"), entry="ok")
    rows = {row.name: row.problem for row in site.host().catalogue(load=True)}
    assert rows["ok"] == ""
    assert "ZeroDivisionError" in rows["bad"]


def test_commands_and_engines_come_through_their_hooks(site: Site) -> None:
    command = "import click\ndef qvm_cli_commands(register): register('hi', click.Command('hi'))"
    site.add("dist-command", command, entry="hi", group="qvm.command.v1")
    engine = (
        "class E:\n  name='eng'\n  def unusable(self, arch): return 'never'\ndef qvm_engines(): return [E]"
    )
    site.add("dist-engine", engine, entry="eng", group="qvm.engine.v1")
    host = site.host()
    assert host.command("hi").name == "hi"
    assert host.engine("eng").unusable("aarch64") == "never"
    with pytest.raises(PluginError, match="unknown engine 'ing'; did you mean 'eng'"):
        host.engine("ing")


def test_importing_the_core_imports_no_plugin() -> None:
    code = (
        "import sys, qvmcore, qvmcore.api, qvmcore.plugins\n"
        "qvmcore.plugins.PluginHost().vdev_types()\n"
        "print([m for m in sys.modules if m.startswith('qvm_') or m == 'unicorn'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
