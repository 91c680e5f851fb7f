"""What our distributions and their tests need, for a free-threaded Python 3.13: all from PyPI.

Two of them say that they are not for it. Without them nothing of ours can be imported, so:

- msgspec has free-threaded wheels from Python 3.14 on, and its source refuses 3.13. Here that check is taken
  out of its source, and the one thing given that it lacks there: the first fields of a static object. We use
  it while a VM is configured, on one thread, which is all that this is good for.
- unicorn's wheel is for the stable ABI, which a free-threaded Python does not have. There is nothing of that
  in it, though, but a library that is called by ctypes: it is unpacked as it is.

None of them switches the GIL on when it is imported; that is checked.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

from qvm_guests.progress import Progress

from qvmcore.api import HostError

ROOT = Path(__file__).resolve().parents[2]
MSGSPEC, UNICORN = "msgspec==0.22.0", "unicorn==2.1.4"
SPECIAL = (MSGSPEC, UNICORN)
#: What of the tests' own dependencies is needed to run them.
_FOR_TESTS = ("hypothesis", "pytest", "pyelftools")
_IMPORTS = "ctypes, lzma, ssl, zlib, click, fdt, hypothesis, msgspec, pluggy, pytest, rich, unicorn"
#: With warnings as errors an extension that switches the GIL on again fails to import.
_CHECK = f"import sys, {_IMPORTS}; sys.exit(sys._is_gil_enabled())"
_REFUSAL = '#error "Py_GIL_DISABLED is only supported in Python 3.14+"\n'
_BEHIND = "#endif // PY314_PLUS\n"
_HEAD = """#ifdef Py_GIL_DISABLED
#undef _PyObject_HEAD_INIT
#define _PyObject_HEAD_INIT(type) { 0, 0, { 0 }, 0, _Py_IMMORTAL_REFCNT_LOCAL, 0, (type) }
#endif
"""
#: Runs a command; raises HostError with what it said.
Run = Callable[..., None]


def requirements() -> list[str]:
    """What our distributions need, without each other and SPECIAL, and what their tests need."""
    wanted = set()
    for path in (ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")):
        project = tomllib.loads(path.read_text())["project"]
        wanted.update(project.get("dependencies", ()))
        extra = project.get("optional-dependencies", {}).get("dev", ())
        wanted.update(word for word in extra if word.startswith(_FOR_TESTS))
    return sorted(word for word in wanted if not word.startswith(("qvm", "msgspec", "unicorn")))


def furnish(prefix: Path, folder: Path, work: Path, run: Run, progress: Progress) -> None:
    """Make ``folder`` an environment of the Python in ``prefix``. Raises HostError."""
    progress.step("making its environment")
    run(str(prefix / "bin" / "python3"), "-m", "venv", str(folder))
    python = str(folder / "bin" / "python")
    pip = (python, "-m", "pip", "--disable-pip-version-check", "-q")
    progress.step(f"compiling {MSGSPEC}")
    run(*pip, "download", "--no-deps", "--no-binary=:all:", "-d", str(work), MSGSPEC)
    run(
        "tar",
        "-xf",
        *map(str, work.glob("msgspec-*.tar.gz")),
        "--one-top-level=msgspec",
        "--strip-components=1",
    )
    _let_in(work / "msgspec" / "src" / "msgspec" / "_core.c")
    run(*pip, "install", str(work / "msgspec"))
    wanted = requirements()
    progress.step(f"installing {', '.join(wanted)}")
    # hypothesis has a part in Rust since; an older one in Python only is better than none.
    run(*pip, "install", "--prefer-binary", *wanted)
    progress.step(f"unpacking {UNICORN}")
    (site,) = folder.glob("lib/python3.*/site-packages")
    wheel = ("--only-binary=:all:", "--implementation=cp", "--abi=abi3", "--python-version=3.13")
    platform = ("--platform=manylinux2014_x86_64", "--platform=manylinux_2_17_x86_64")
    run(*pip, "install", "--no-deps", "--target", str(site), *wheel, *platform, UNICORN)
    run(python, "-W", "error", "-c", _CHECK)


def _let_in(path: Path) -> None:
    """Have msgspec's source accept Python 3.13 without a GIL; ``_BEHIND`` is where it knows its version."""
    text = path.read_text()
    if text.count(_REFUSAL) != 1 or _BEHIND not in text:
        raise HostError(
            f"{MSGSPEC} is not as it was: {path.name} does not refuse Python 3.13 in the known way"
        )
    before, behind, after = text.replace(_REFUSAL, "").partition(_BEHIND)
    path.write_text(before + behind + _HEAD + after)
