"""Every fuzz target on every kept input and on a bounded number of new ones; ``run.py`` goes on longer."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.bytesource import ByteSource
from tests.fuzz.run import mutated
from tests.fuzz.targets import CORPUS, TARGETS, kept

#: Runs of a target beside the kept inputs: of Hypothesis, and of mutations of what is kept.
EXAMPLES, MUTATIONS = 300, 300
#: Starting a device costs milliseconds, not microseconds.
SLOW_EXAMPLES, SLOW_MUTATIONS = 40, 40
SLOW = {name for name in TARGETS if name.startswith("virtio-")} | {"net-peer", "pl011", "pl061", "shmem"}


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_or_is_known_stays_right(name: str) -> None:
    assert kept(name), f"no seed is kept in corpus/{name}"
    for path in kept(name):
        try:
            TARGETS[name](path.read_bytes())
        except BaseException as error:
            error.add_note(f"input: {path.relative_to(CORPUS)}")
            raise


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_new_is_found_soon(name: str) -> None:
    """The same inputs each time: what a longer run finds is kept in the corpus instead."""
    target, slow = TARGETS[name], name in SLOW

    @settings(
        max_examples=SLOW_EXAMPLES if slow else EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(max_size=512))
    def run(data: bytes) -> None:
        target(data)

    run()
    chance, pool = random.Random(name), [path.read_bytes() for path in kept(name)]
    for _ in range(SLOW_MUTATIONS if slow else MUTATIONS):
        data = mutated(chance, pool)
        try:
            target(data)
        except BaseException as error:
            error.add_note(f"input: {data!r}")
            raise


def test_the_corpus_is_small_and_has_no_strangers() -> None:
    names = {path.name for path in CORPUS.iterdir()}
    assert names == set(TARGETS)
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert max(sizes) <= 4096
    assert sum(sizes) <= 64 << 10


def test_every_input_is_a_run() -> None:
    source = ByteSource(b"\x05abc\xff")
    assert (source.byte(), source.take(2), source.uint(2), bool(source)) == (5, b"ab", 0xFF63, False)
    assert (source.byte(), source.take(9), source.uint(8), source.value(8)) == (0, b"", 0, 0)


def test_a_run_that_finds_something_says_so_and_keeps_it(tmp_path: Path) -> None:
    """The runner itself, on a target that refuses one byte."""
    script = tmp_path / "found.py"
    script.write_text(
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(CORPUS.parents[2])!r})\n"
        "from tests.fuzz import run, targets\n"
        f"targets.CORPUS = run.ROOT = pathlib.Path({str(tmp_path)!r})\n"
        "def units(data): assert b'\\x07' not in data\n"
        "targets.TARGETS['units'] = units\n"
        "sys.argv = ['run.py', 'units', '--plain', '--seconds', '60', '--seed', '1']\n"
        "sys.exit(run.main())\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    found = list((tmp_path / "units").glob("crash-*"))
    assert len(found) == 1 and b"\x07" in found[0].read_bytes()
