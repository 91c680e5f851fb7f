"""From packages to a guest, with an apt that is made up: cache, offline, interruption, lock, errors."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from fake_debian import RELEASE, FakeApt
from qvm_guests import build as builder
from qvm_guests.cache import GuestCache
from qvm_guests.progress import Progress
from qvm_guests.recipes import RECIPES, find

from qvmcore.api import HostError, QvmError

RECIPE = RECIPES["debian-arm64"]


class Notes(Progress):
    """A progress that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def run(directory: Path, **options: object) -> list[str]:
    notes = Notes()
    builder.build(RECIPE, directory, notes, **options)  # type: ignore[arg-type]
    return notes.lines


def test_build_writes_the_guest(fake_apt: FakeApt, tmp_path: Path) -> None:
    run(tmp_path / "guest")
    assert (tmp_path / "guest/vmlinuz").read_bytes() == b"kernel"
    assert sorted(p.name for p in (tmp_path / "guest").iterdir()) == sorted(
        [builder.KERNEL, builder.INITRAMFS, builder.MANIFEST]
    )
    manifest = builder.manifest(tmp_path / "guest")
    assert manifest["kernel_release"] == RELEASE
    assert "virtio_blk" in manifest["modules"]
    assert manifest["modules_built_in"] == ["ext4", "gpio_pl061"]
    kernel, busybox = manifest["packages"]
    assert (kernel["name"], kernel["version"]) == ("linux-image-6.1.0-1-test", "1:2")
    assert (busybox["name"], busybox["version"]) == ("busybox-static", "1")


def test_a_warm_cache_asks_nobody_and_gives_the_same_bytes(fake_apt: FakeApt, tmp_path: Path) -> None:
    run(tmp_path / "one")
    before = fake_apt.calls()
    fake_apt.switch("no-network", True)
    run(tmp_path / "two")
    assert fake_apt.calls() == before
    for name in (builder.KERNEL, builder.INITRAMFS, builder.MANIFEST):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_refresh_asks_again_and_says_when_it_cannot(fake_apt: FakeApt, tmp_path: Path) -> None:
    run(tmp_path / "guest")
    before = len(fake_apt.calls())
    run(tmp_path / "guest", refresh=True)
    assert len(fake_apt.calls()) > before
    fake_apt.switch("no-network", True)
    with pytest.raises(HostError, match=r"cannot refresh .*Could not resolve"):
        run(tmp_path / "guest", refresh=True)
    run(tmp_path / "guest")


def test_a_damaged_package_is_fetched_again(fake_apt: FakeApt, tmp_path: Path) -> None:
    run(tmp_path / "guest")
    cache = GuestCache(RECIPE.name)
    victim = next(cache.debs.glob("busybox*"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert any("is damaged" in line for line in run(tmp_path / "guest"))
    assert len(cache.verified(print)) == 2


def test_a_damaged_manifest_is_not_believed(fake_apt: FakeApt, tmp_path: Path) -> None:
    run(tmp_path / "guest")
    (GuestCache(RECIPE.name).root / "manifest.json").write_text("{")
    assert any("is damaged" in line for line in run(tmp_path / "guest"))


def test_an_interrupted_download_keeps_its_part_and_is_finished(fake_apt: FakeApt, tmp_path: Path) -> None:
    fake_apt.switch("cut-off", True)
    with pytest.raises(HostError, match=r"Connection reset.*what was fetched is kept"):
        run(tmp_path / "guest")
    assert not (tmp_path / "guest").exists()
    cache = GuestCache(RECIPE.name)
    assert [path.stat().st_size for path in cache.debs.iterdir()] == [100]
    assert cache.verified(print) == []
    fake_apt.switch("cut-off", False)
    run(tmp_path / "guest")


def test_no_network_and_a_cold_cache(fake_apt: FakeApt, tmp_path: Path) -> None:
    fake_apt.switch("no-network", True)
    with pytest.raises(HostError, match=r"cannot get linux-image-cloud-arm64.*Could not resolve.*network"):
        run(tmp_path / "guest")
    assert not (tmp_path / "guest").exists()


def test_no_apt(fake_apt: FakeApt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"there is no apt-get on this machine; "):
        run(tmp_path / "guest")


def test_a_source_apt_cannot_read_is_left_out(fake_apt: FakeApt, tmp_path: Path) -> None:
    (fake_apt.root / "etc/parts/broken.list").write_text("rubbish")
    lines = run(tmp_path / "guest")
    assert any("leaving out" in line and "broken.list" in line for line in lines)


def test_the_private_apt_has_nothing_of_the_system(fake_apt: FakeApt, tmp_path: Path) -> None:
    run(tmp_path / "guest")
    root = GuestCache(RECIPE.name).apt
    config = (root / "apt.conf").read_text()
    for key in ("Dir::State", "Dir::State::status", "Dir::Cache"):
        assert f'{key} "{root}' in config
    assert 'APT::Architectures { "arm64"; };' in config
    assert "#clear APT::Update::Post-Invoke-Success;" in config
    assert "DEP-11::DefaultEnabled" in config
    assert "Packages::DefaultEnabled" not in config


def test_a_directory_that_is_a_file(fake_apt: FakeApt, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=r"cannot write to .*file: .*choose a directory"):
        run(tmp_path / "file")
    assert fake_apt.calls() == []


def test_nothing_half_written_when_the_disk_is_full(
    fake_apt: FakeApt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        if data == b"kernel":
            raise OSError(28, "No space left on device", str(self))
        return write_bytes(self, data)

    write_bytes = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(HostError, match=r"No space left on device; free some space"):
        run(tmp_path / "guest")
    assert not (tmp_path / "guest").exists()


def test_a_second_build_waits_for_the_first(fake_apt: FakeApt, tmp_path: Path) -> None:
    ready = threading.Event()

    def hold() -> None:
        # A flock belongs to the open file, so a thread that opens it again is as good as a process.
        with GuestCache(RECIPE.name).locked(print):
            ready.set()
            time.sleep(0.5)

    other = threading.Thread(target=hold)
    other.start()
    assert ready.wait(10)
    started = time.monotonic()
    lines = run(tmp_path / "guest")
    assert time.monotonic() - started > 0.3
    assert "waiting for it" in lines[0]
    other.join()


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(QvmError, match=r"did you mean 'debian-arm64'"):
        find("debian-arm")


def test_show_without_a_guest(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"qvm guest build"):
        builder.manifest(tmp_path)
    (tmp_path / builder.MANIFEST).write_text(json.dumps([]))
    with pytest.raises(HostError, match=r"not the manifest"):
        builder.manifest(tmp_path)
