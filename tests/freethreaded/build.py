"""Builds a Python without a GIL and an environment for qvm's tests: ``python -m tests.freethreaded.build``.

Neither Debian nor PyPI has a free-threaded Python ready, so Debian's source is built, with
``--disable-gil`` and nothing else that is special. Run it in the root of the repository; it needs a
compiler and some headers of Debian, and says which. About four minutes on two cores, in nobody's way
(`nice`). What it made stays in qvm's cache, beside the guests; a folder there gets its name when it is
complete, so an interrupted build leaves nothing that looks done. The last line is the new Python.

What our distributions need is put beside it (``furnish.py``); they themselves are not: they come from the
working copy whose tests are run (``installed.py``).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qvm_guests import atomic
from qvm_guests.cache import GuestCache
from qvm_guests.progress import Progress

from qvmcore.api import HostError, QvmError
from tests.freethreaded import furnish, source

COMMAND = "python -m tests.freethreaded.build"
CONFIGURE = ("--disable-gil", "--without-ensurepip", "--disable-test-modules", "OPT=-DNDEBUG -O3")
#: Debian package -> the header it brings; without these Python is built, but without a module we need.
HEADERS = {
    "zlib1g-dev": "zlib.h",
    "libffi-dev": "ffi.h",
    "libssl-dev": "openssl/ssl.h",
    "liblzma-dev": "lzma.h",
}


def cache() -> GuestCache:
    """Where it is kept."""
    return GuestCache("freethreaded")


def built() -> Path | None:
    """The Python of the newest complete environment in the cache, or None."""
    environments = sorted(cache().root.glob("venv-*/bin/python"), key=lambda path: path.lstat().st_mtime)
    return environments[-1] if environments else None


def build(progress: Progress) -> Path:
    """The Python to start, built and furnished if that is not done already. Raises HostError."""
    ours = cache()
    with ours.locked(progress.note) as lock, atomic.host_errors("use the cache", ours.root):
        for left in ours.root.glob("unfinished-*"):
            shutil.rmtree(left)
        package = source.obtain(ours, progress, lock)
        key = _key(package.sha256, *CONFIGURE)
        prefix = ours.root / f"python-{key}"
        if not prefix.is_dir():
            _refuse_without_headers()
            with _complete(prefix) as folder:
                _compile(ours.path(package), folder, prefix, progress, lock)
        wanted = furnish.requirements()
        environment = ours.root / f"venv-{_key(key, *wanted, *furnish.SPECIAL)}"
        if not environment.is_dir():
            with _complete(environment) as folder, _workplace(ours.root) as work:
                furnish.furnish(prefix, folder, work, _runner(work, lock), progress)
        return environment / "bin" / "python"


def _key(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def _refuse_without_headers() -> None:
    for tool in ("gcc", "make", "tar", "xz"):
        if shutil.which(tool) is None:
            raise HostError(
                f"there is no {tool} on this machine", hint="apt-get install gcc make tar xz-utils"
            )
    missing = [package for package, header in HEADERS.items() if not _compiles(f"#include <{header}>\n")]
    if missing:
        raise HostError("headers are missing", hint=f"apt-get install {' '.join(missing)}")


def _compiles(text: str) -> bool:
    ran = subprocess.run(["gcc", "-E", "-"], input=text.encode(), capture_output=True, check=False)
    return ran.returncode == 0


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` at the end and is removed on an error."""
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix="unfinished-"))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=parent, prefix="unfinished-") as name:
        yield Path(name)


def _compile(archive: Path, folder: Path, prefix: Path, progress: Progress, lock: int) -> None:
    """Build in a folder of its own, install as if ``prefix`` were below it, and take that into ``folder``."""
    with _workplace(prefix.parent) as work:
        tree, installed = work / "source", work / "installed"
        tree.mkdir()
        run = _runner(tree, lock)
        progress.step(f"unpacking {archive.name}")
        run("tar", "-xf", str(archive), "--strip-components=1")
        progress.step("configuring Python with --disable-gil")
        run("./configure", f"--prefix={prefix}", *CONFIGURE)
        progress.step("compiling Python: some minutes")
        run("make", f"-j{os.cpu_count() or 1}")
        progress.step("installing it into the cache")
        run("make", "install", f"DESTDIR={installed}")
        for path in (installed / prefix.relative_to("/")).iterdir():
            path.rename(folder / path.name)


def _runner(folder: Path, lock: int) -> furnish.Run:
    """Runs a command in ``folder``, gently; the end of what it said becomes a HostError if it fails."""
    log = folder / "qvm-build.log"

    def run(*command: str) -> None:
        with log.open("w") as output:
            # Neither where we are imported from nor a forced GIL is for the Python that is made here.
            environment = {name: os.environ[name] for name in os.environ if not name.startswith("PYTHON")}
            ran = subprocess.run(
                ["nice", "-n", "19", *command],
                cwd=folder,
                env={**environment, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                check=False,
            )
        if ran.returncode:
            said = log.read_text(errors="replace").strip()[-2000:]
            raise HostError(f"`{' '.join(command[:4])}` ended with {ran.returncode}:\n{said}")

    return run


def main() -> int:
    """Build, and print the Python to start."""
    try:
        print(build(Progress()))
    except QvmError as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("build: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
