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
#: Evidence records kept; the oldest go first.
KEPT = 200


def folder() -> Path:
    """Where the files are."""
    home = os.environ.get("XDG_STATE_HOME")
    if home:
        return Path(home) / "qvm" / "quiesce"
    if os.geteuid() == 0:
        return Path("/var/lib/qvm/quiesce")
    return Path.home() / ".local" / "state" / "qvm" / "quiesce"


def keep(evidence: Evidence, root: Path | None = None, quarantine: Collection[str] | None = None) -> Path:
    """Write a record, quarantine what was not proven quiet, release what was. Raises OSError.

    ``quarantine``: the devices to quarantine; by default all with that verdict.
    """
    root = root or folder()
    body = evidence.to_json()
    stamp = f"{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 1_000_000_000:09d}"
    path = _write(root / "evidence", f"{stamp}-{_SAFE.sub('_', evidence.vm)}.json", body)
    for device in evidence.devices:
        if device.verdict is Verdict.QUARANTINED:
            if quarantine is not None and device.device not in quarantine:
                continue
            entry = {
                "device": device.device,
                "reason": device.reason,
                "vm": evidence.vm,
                "evidence": str(path),
                "keeper": evidence.keeper,
            }
            _write(root / "quarantine", _file(device.device), entry)
        else:
            release(device.device, root)
    for old in sorted((root / "evidence").glob("*.json"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def quarantined(root: Path | None = None) -> dict[str, dict[str, Any]]:
    """The quarantined devices by name; an entry that cannot be read counts, with that as its reason."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(((root or folder()) / "quarantine").glob("*.json")):
        try:
            entry = json.loads(path.read_text())
            found[entry["device"]] = entry
        except (OSError, ValueError, KeyError, TypeError) as error:
            found[path.stem] = {"device": path.stem, "reason": f"unreadable entry {path}: {error}", "vm": ""}
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
    for path in sorted(((root or folder()) / "evidence").glob("*.json"), reverse=True):
        try:
            body = json.loads(path.read_text())
            yield path, body if body.get("sha256") == checksum(body) else None
        except (OSError, ValueError, AttributeError):
            yield path, None


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
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return path
