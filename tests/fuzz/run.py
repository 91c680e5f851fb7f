#!/usr/bin/env python3
"""Fuzz one target for a while: ``python tests/fuzz/run.py split-ring --seconds 60``.

With atheris installed (``pip install atheris``) the run is guided by coverage; without it, kept inputs
are mutated blindly. What makes a target fail is kept as ``corpus/TARGET/crash-*``, from where the tests
run it for ever after; exit status 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import logging
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="a name of tests/fuzz/targets.py, or 'list'")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers; 0: a new one each time")
    parser.add_argument("--plain", action="store_true", help="without atheris")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    # Devices tell their user of every guest that is wrong, and here all are.
    logging.disable()
    atheris = None if arguments.plain else _atheris()
    with _guided(atheris, arguments.target):
        targets = importlib.import_module("tests.fuzz.targets")
    if arguments.target == "list":
        print("\n".join(targets.TARGETS))
        return 0
    if arguments.target not in targets.TARGETS:
        parser.error(f"unknown target {arguments.target!r}; there are: {', '.join(targets.TARGETS)}")
    run = _run_guided if atheris else _run_plain
    return run(atheris, targets, arguments)


def _atheris() -> Any:
    try:
        return importlib.import_module("atheris")
    except ImportError:
        print("atheris is not installed: mutating blindly", file=sys.stderr)
        return None


@contextlib.contextmanager
def _guided(atheris: Any, name: str) -> Iterator[None]:
    if atheris is None:
        yield
        return
    plugins = [path.name for path in ROOT.glob("plugins/*/qvm_*")]
    with atheris.instrument_imports(include=["qvmcore", *plugins]):
        targets = importlib.import_module("tests.fuzz.targets")
        if name in targets.TARGETS:
            # Targets import their plugin late, so that one can run without all plugins: now.
            with contextlib.suppress(Exception):
                targets.TARGETS[name](b"")
        yield


def _run_guided(atheris: Any, targets: Any, arguments: argparse.Namespace) -> int:
    target, name = targets.TARGETS[arguments.target], arguments.target
    found = 0

    def once(data: bytes) -> None:
        nonlocal found
        try:
            target(data)
        except BaseException:
            found += 1
            _keep(targets, name, data)
            raise

    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.argv[0], folder, str(targets.CORPUS / name), f"-max_total_time={arguments.seconds}",
            f"-seed={arguments.seed}", f"-artifact_prefix={folder}/", "-timeout=20",
            "-max_len=512", "-len_control=0", "-print_final_stats=1",
        ]  # fmt: skip
        (targets.CORPUS / name).mkdir(parents=True, exist_ok=True)
        atheris.Setup(words, once)
        atheris.Fuzz()
    return 1 if found else 0


def _run_plain(_atheris: Any, targets: Any, arguments: argparse.Namespace) -> int:
    target, name = targets.TARGETS[arguments.target], arguments.target
    chance = random.Random(arguments.seed or None)
    pool = [path.read_bytes() for path in targets.kept(name)] or [b""]
    end, runs = time.monotonic() + arguments.seconds, 0
    while time.monotonic() < end:
        data = mutated(chance, pool)
        runs += 1
        try:
            target(data)
        except BaseException:
            traceback.print_exc()
            _keep(targets, name, data)
            return 1
        if chance.random() < 0.01 and len(pool) < 500:
            pool.append(data)
    print(f"{name}: {runs} runs in {arguments.seconds} s, nothing found")
    return 0


def mutated(chance: random.Random, pool: list[bytes]) -> bytes:
    """One of the pool with a few bytes changed, inserted, removed, or taken from another."""
    data = bytearray(chance.choice(pool))
    for _ in range(chance.randint(1, 8)):
        at = chance.randint(0, len(data))
        match chance.randint(0, 4):
            case 0 if at < len(data):
                data[at] = chance.randint(0, 255)
            case 1:
                data[at:at] = chance.randbytes(chance.randint(1, 16))
            case 2:
                del data[at : at + chance.randint(1, 16)]
            case 3:
                other = chance.choice(pool)
                data[at:] = other[chance.randint(0, len(other)) :]
            case _:
                data += chance.randbytes(chance.randint(1, 64))
    return bytes(data[:512])


def _keep(targets: Any, name: str, data: bytes) -> None:
    path = targets.CORPUS / name / f"crash-{hashlib.sha256(data).hexdigest()[:12]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    print(f"kept as {path.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
