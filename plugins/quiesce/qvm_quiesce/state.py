"""What outlives a VM: evidence records, and which devices are quarantined.

Files below ``$XDG_STATE_HOME/qvm/quiesce`` (for root ``/var/lib/qvm/quiesce``), written whole or not at
all, readable by their owner only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from qvm_quiesce.evidence import Evidence, Verdict, checksum

_SAFE = re.compile(r"[^A-Za-z0-9_.:-]")
#: Evidence records kept; the oldest go first, but not while a quarantine refers to them.
KEPT = 200


def folder() -> Path:
    """Where the files are. Raises OSError when there is no place for them."""
    home = os.environ.get("XDG_STATE_HOME", "")
    # The XDG base directory specification: a relative path is invalid and counts for nothing.
    if home.startswith("/"):
        return Path(home) / "qvm" / "quiesce"
    if os.geteuid() == 0:
        return Path("/var/lib/qvm/quiesce")
    try:
        return Path.home() / ".local" / "state" / "qvm" / "quiesce"
    except RuntimeError as error:
        raise OSError("this user has no home: set XDG_STATE_HOME") from error


def check(root: Path) -> None:
    """See whether records and quarantines can be written. Raises OSError."""
    for name in ("evidence", "quarantine"):
        _write(root / name, ".check", {}).unlink()


def keep(evidence: Evidence, root: Path | None = None, quarantine: Collection[str] | None = None) -> Path:
    """Write a record, quarantine what was not proven quiet, release what was. Raises OSError.

    ``quarantine``: the devices to quarantine; by default all with that verdict. They are quarantined
    first, and also when the record cannot be written.
    """
    root = root or folder()
    now = time.time_ns()
    stamp = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now // 10**9))}-{now % 10**9:09d}"
    name = f"{stamp}-{_SAFE.sub('_', evidence.vm)[:100]}.json"
    bad = {each.device: each for each in evidence.devices if each.verdict is Verdict.QUARANTINED}
    for device in bad.values():
        if quarantine is None or device.device in quarantine:
            entry = {
                "device": device.device,
                "reason": device.reason,
                "vm": evidence.vm,
                "evidence": str(root / "evidence" / name),
                "keeper": evidence.keeper,
                "keeper_started": evidence.keeper_started,
            }
            _write(root / "quarantine", _file(device.device), entry)
    path = _write(root / "evidence", name, evidence.to_json())
    # Only with the proof on the disk.
    for each in evidence.devices:
        if each.device not in bad:
            release(each.device, root)
    needed = {Path(entry["evidence"]).name for entry in quarantined(root).values()}
    for old in sorted((root / "evidence").glob("*.json"))[:-KEPT]:
        if old.name not in needed:
            old.unlink(missing_ok=True)
    return path


def quarantined(root: Path | None = None) -> dict[str, dict[str, Any]]:
    """The quarantined devices by name; an entry that cannot be read counts, with that as its reason.

    An entry has at least device, reason, vm and evidence (texts), keeper and keeper_started (integers).
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(((root or folder()) / "quarantine").glob("[!.]*.json")):
        try:
            entry = json.loads(path.read_text())
            if _file(entry["device"]) != path.name:
                raise ValueError("it is about another device")
        except (OSError, ValueError, KeyError, TypeError) as error:
            entry = {"device": path.stem, "reason": f"unreadable entry {path}: {error}"}
        plain = {key: str(entry.get(key, "")) for key in ("device", "reason", "vm", "evidence")}
        numbers = {key: _integer(entry.get(key)) for key in ("keeper", "keeper_started")}
        found[plain["device"]] = {**plain, **numbers}
    return found


def release(device: str, root: Path | None = None) -> bool:
    """End the quarantine of a device; whether there was one."""
    path = (root or folder()) / "quarantine" / _file(device)
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def records(root: Path | None = None) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Evidence records, newest first; None for one that is damaged."""
    for path in sorted(((root or folder()) / "evidence").glob("[!.]*.json"), reverse=True):
        try:
            body = json.loads(path.read_text())
            yield path, body if body.get("sha256") == checksum(body) else None
        except (OSError, ValueError, AttributeError):
            yield path, None


def started(pid: int) -> int:
    """When a process began, in clock ticks since boot (proc(5), stat, field 22); 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _integer(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _file(device: str) -> str:
    return _SAFE.sub("_", device) + ".json"


def _write(folder: Path, name: str, body: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / name
    partial = folder / f".{name}.{os.getpid()}"
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(json.dumps(body, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(above)
        finally:
            os.close(above)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return path
