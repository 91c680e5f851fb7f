"""`qvm guest` as it is typed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import click
import qvm_guests
from click.testing import CliRunner
from fake_debian import FakeApt
from qvm_guests.cli import guest


def test_the_plugin_registers_one_command() -> None:
    found: dict[str, click.Command] = {}
    qvm_guests.qvm_cli_commands(found.__setitem__)
    assert found == {"guest": guest}


def test_list() -> None:
    assert "debian-arm64 " in CliRunner().invoke(guest, ["list"]).output


def test_build_and_show(fake_apt: FakeApt, tmp_path: Path) -> None:
    done = CliRunner().invoke(guest, ["build", "debian-arm64", str(tmp_path / "guest")])
    assert done.exit_code == 0, done.output
    assert "fetching 2 packages" in done.stderr
    assert str(tmp_path / "guest/initramfs.cpio.gz") in done.stdout
    machine = tomllib.loads(done.stdout.split("# a VM file for it:")[1])
    assert machine["load"]["kernel"] == str(tmp_path / "guest/vmlinuz")
    shown = CliRunner().invoke(guest, ["show", str(tmp_path / "guest")])
    assert json.loads(shown.output)["recipe"] == "debian-arm64"
