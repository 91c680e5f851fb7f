"""Records and quarantine on the disk: order, damage, places that cannot be written."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from qvm_quiesce import state as files
from qvm_quiesce.evidence import DeviceEvidence, Evidence, Verdict

NAME = "0000:03:00.0"


def evidence(verdict: Verdict, device: str = NAME) -> Evidence:
    found = Evidence("vm", "test", "end", time.time())
    found.devices.append(DeviceEvidence(device, "8086:1234", verdict, "it wrote on"))
    return found


def test_a_quarantine_is_written_and_ends_with_a_proof(tmp_path: Path) -> None:
    files.keep(evidence(Verdict.QUARANTINED), tmp_path)
    entry = files.quarantined(tmp_path)[NAME]
    assert (entry["reason"], entry["vm"], entry["keeper"]) == ("it wrote on", "vm", 0)
    assert Path(entry["evidence"]).is_file()
    files.keep(evidence(Verdict.DEGRADED), tmp_path)
    assert files.quarantined(tmp_path) == {}


def test_a_device_is_quarantined_though_the_record_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "evidence").write_text("in the way")
    with pytest.raises(OSError):
        files.keep(evidence(Verdict.QUARANTINED), tmp_path)
    assert list(files.quarantined(tmp_path)) == [NAME]


def test_without_the_proof_on_the_disk_a_quarantine_does_not_end(tmp_path: Path) -> None:
    files.keep(evidence(Verdict.QUARANTINED), tmp_path)
    (tmp_path / "evidence").rename(tmp_path / "elsewhere")
    (tmp_path / "evidence").write_text("in the way")
    with pytest.raises(OSError):
        files.keep(evidence(Verdict.QUIESCED), tmp_path)
    assert list(files.quarantined(tmp_path)) == [NAME]


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[]", "{}", '{"device": 7}', '{"device": "0000:09:00.0"}', '{"device": ["a"]}', "\0"],
)
def test_a_damaged_entry_keeps_its_device_quarantined_until_it_is_released(tmp_path: Path, text: str) -> None:
    (tmp_path / "quarantine").mkdir()
    (tmp_path / "quarantine" / f"{NAME}.json").write_text(text)
    entry = files.quarantined(tmp_path)[NAME]
    assert entry["reason"].startswith("unreadable entry")
    assert (entry["vm"], entry["keeper"]) == ("", 0)
    assert files.release(NAME, tmp_path)
    assert files.quarantined(tmp_path) == {}


@pytest.mark.parametrize("keeper", ["1", -1, True, None, 1.5, {}])
def test_a_keeper_that_is_no_number_is_none(tmp_path: Path, keeper: object) -> None:
    (tmp_path / "quarantine").mkdir()
    entry = {"device": NAME, "reason": "r", "keeper": keeper}
    (tmp_path / "quarantine" / f"{NAME}.json").write_text(json.dumps(entry))
    assert files.quarantined(tmp_path)[NAME]["keeper"] == 0


def test_old_records_go_but_not_those_a_quarantine_refers_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "KEPT", 2)
    first = files.keep(evidence(Verdict.QUARANTINED), tmp_path)
    later = [files.keep(evidence(Verdict.QUIESCED, f"0000:0{n}:00.0"), tmp_path) for n in range(4, 8)]
    assert sorted((tmp_path / "evidence").iterdir()) == [first, *later[-2:]]


def test_records_are_in_the_order_of_time_wherever_the_clock_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour that happens twice (summer time ends) does not mix them up: names are UTC."""
    paths = []
    for zone in ("UTC-5", "UTC+5"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        paths.append(files.keep(evidence(Verdict.QUIESCED), tmp_path))
    monkeypatch.delenv("TZ")
    time.tzset()
    assert paths == sorted(paths)


def test_nobody_else_reads_the_files_and_nothing_half_written_stays(tmp_path: Path) -> None:
    path = files.keep(evidence(Verdict.QUARANTINED), tmp_path / "state")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not list((tmp_path / "state").rglob(".*"))
    files.check(tmp_path / "state")
    assert not list((tmp_path / "state").rglob(".*"))


def test_a_relative_state_home_counts_for_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG base directory specification; and the guard has another current folder."""
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.folder() == tmp_path / ".local" / "state" / "qvm" / "quiesce"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert files.folder() == Path("/var/lib/qvm/quiesce")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match="set XDG_STATE_HOME"):
        files.folder()
