"""apt with a state of its own: the machine's sources, keys and proxies, and nothing else of it.

The lists, the caches and the (empty) dpkg status are ours and of the guest's architecture, so the
system's apt and dpkg are neither written nor changed, and no root is needed. apt checks signatures
and checksums, and continues a download that was cut off.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from qvm_guests import atomic
from qvm_guests.cache import Package, sha256
from qvm_guests.progress import Progress
from qvmcore.api import HostError

_URI_LINE = re.compile(r"^'([^']*)' (\S+)_(\S+)_(\S+)\.deb (\d+) (\w+:[0-9a-f]+)")
_STATUS = re.compile(r"^dlstatus:\d+:([\d.]+):")


@dataclass(frozen=True, slots=True)
class _Ran:
    """What an apt tool printed; ``problem`` is its first complaint if it failed, else empty."""

    output: str
    problem: str


def _apt_paths(**settings: str) -> dict[str, Path]:
    """Paths of the machine's apt configuration; one that is not set becomes a path that is not there."""
    words = [word for pair in settings.items() for word in pair]
    done = subprocess.run(["apt-config", "shell", *words], capture_output=True, text=True, check=False)
    found = dict(re.findall(r"^(\w+)='(.*)'$", done.stdout, re.MULTILINE))
    return {name: Path(found.get(name) or "/nonexistent") for name in settings}


def _remedy(problem: str) -> str:
    """What to do about a download that failed."""
    if "No space left" in problem:
        return "free some space there and run it again; what was fetched is kept"
    return "check the network (or apt's proxy) and run it again; what was fetched is kept"


class PrivateApt:
    """apt for one guest architecture, below ``root``. ``lock`` is held by every process it starts."""

    def __init__(self, root: Path, architecture: str, progress: Progress, lock: int) -> None:
        self._root = root
        self._architecture = architecture
        self._progress = progress
        self._lock = lock
        self._config = root / "apt.conf"
        self._unreachable = ""

    def prepare(self, sources: Path | None = None) -> None:
        """Make the state directories; take the sources of the machine, or of the file ``sources``."""
        for tool in ("apt-get", "apt-cache", "apt-config"):
            if shutil.which(tool) is None:
                raise HostError(
                    f"there is no {tool} on this machine",
                    hint="build the guest on a Debian-like machine and copy the directory",
                )
        places = self._root / "sources"
        for name in ("state/lists/partial", "cache/archives/partial", "sources"):
            (self._root / name).mkdir(parents=True, exist_ok=True)
        (self._root / "status").write_bytes(b"")
        for old in places.iterdir():
            old.unlink()
        atomic.write(self._config, self._configuration().encode())
        for path in [sources.absolute()] if sources else self._machine_sources():
            # apt decides by the suffix how to read it; "sources.list" sorts as one of them.
            (places / path.name).symlink_to(path)
        if self._run("apt-get", "indextargets").problem:
            self._drop_unreadable(places)

    def _configuration(self) -> str:
        root = self._root
        lines = [
            f'Dir::State "{root}/state";',
            f'Dir::State::status "{root}/status";',
            f'Dir::Cache "{root}/cache";',
            'Dir::Etc::sourcelist "/dev/null";',
            f'Dir::Etc::sourceparts "{root}/sources";',
            f'APT::Architecture "{self._architecture}";',
            "#clear APT::Architectures;",
            f'APT::Architectures {{ "{self._architecture}"; }};',
            # Hooks of the machine (caches of desktop tools) are about its own packages.
            *(
                f"#clear APT::Update::{hook};"
                for hook in ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")
            ),
            # apt as root hands downloads to a user who cannot enter a private cache directory.
            'APT::Sandbox::User "root";',
            'Acquire::Languages "none";',
        ]
        dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False).stdout
        for target in re.findall(r'^(Acquire::IndexTargets::[\w-]+::[\w-]+) "', dump, re.MULTILINE):
            if not target.endswith("::Packages"):  # descriptions, icons, file lists: not needed here
                lines.append(f'{target}::DefaultEnabled "false";')
        return "".join(line + "\n" for line in lines)

    def _machine_sources(self) -> list[Path]:
        found = _apt_paths(FILE="Dir::Etc::sourcelist/f", PARTS="Dir::Etc::sourceparts/d")
        file, parts = found["FILE"], found["PARTS"]
        paths = [file] if file.is_file() else []
        if parts.is_dir():
            paths += sorted(path for path in parts.iterdir() if path.suffix in (".list", ".sources"))
        return [path for path in paths if os.access(path, os.R_OK)]

    def _drop_unreadable(self, places: Path) -> None:
        """One source that apt cannot parse stops all of them: keep those that it can."""
        for path in sorted(places.iterdir()):
            only = ("-o", f"Dir::Etc::sourcelist={path}", "-o", "Dir::Etc::sourceparts=/dev/null")
            if problem := self._run("apt-get", *only, "indextargets").problem:
                self._progress.note(f"leaving out {path.resolve()}: {problem}")
                path.unlink()

    def update(self, *, must: bool) -> None:
        """Fetch the package lists. Sources that fail are only named, unless all do and it ``must`` work."""
        self._progress.step("fetching the package lists")
        ran = self._run("apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update")
        self._unreachable = ran.problem
        if not ran.problem:
            return
        if must and not re.search(r"^(Get|Hit):", ran.output, re.MULTILINE):
            raise HostError(
                f"cannot refresh the package lists: {ran.problem}",
                hint="check the network; without --refresh the packages in the cache are used",
            )
        self._progress.note(f"apt: {ran.problem}")

    def dependency(self, name: str, prefix: str) -> str:
        """The package beginning with ``prefix`` that the candidate of ``name`` depends on."""
        shown = self._run("apt-cache", "show", "--no-all-versions", name)
        if shown.problem or not shown.output.strip():
            raise self._unavailable(name)
        depends = re.search(r"^Depends: (.*)$", shown.output, re.MULTILINE)
        for item in re.split(r"[,|]\s*", depends[1]) if depends else []:
            if item.startswith(prefix):
                return item.split()[0]
        raise HostError(f"the package {name} names no kernel: it depends on no {prefix}...")

    def download(self, names: Sequence[str], into: Path) -> list[Package]:
        """Fetch packages into a directory; files that are there in full or in part are used."""
        planned = self._run("apt-get", "download", "--print-uris", *names)
        lines = [match for line in planned.output.splitlines() if (match := _URI_LINE.match(line))]
        for name in names:
            if name not in {match[2] for match in lines}:
                raise self._unavailable(name)
        total = sum(int(match[5]) for match in lines)
        self._progress.step(f"fetching {len(lines)} packages, {total / 1e6:.1f} MB")
        files = [into / f"{match[2]}_{match[3]}_{match[4]}.deb" for match in lines]
        wanted: list[str] = []
        for match, path in zip(lines, files, strict=True):
            if path.is_file() and path.stat().st_size >= int(match[5]):
                if f"SHA256:{sha256(path)}" == match[6]:
                    continue
                path.unlink()
            wanted += [match[1], str(path), match[6]]
        # Not "apt-get download": that begins again, where apt-helper continues a part of a file.
        ran = self._run(self._helper(), "download-file", *wanted) if wanted else planned
        if ran.problem:
            raise HostError(f"cannot fetch the packages: {ran.problem}", hint=_remedy(ran.problem))
        return [
            Package(match[2], unquote(match[3]), match[4], path.name, path.stat().st_size, sha256(path))
            for match, path in zip(lines, files, strict=True)
        ]

    def _helper(self) -> str:
        """apt's own fetching tool; it lives beside the directory of the transport methods."""
        helper = _apt_paths(METHODS="Dir::Bin::methods/f")["METHODS"].parent / "apt-helper"
        if not os.access(helper, os.X_OK):
            raise HostError(f"there is no {helper} on this machine", hint="install the package apt")
        return str(helper)

    def _unavailable(self, name: str) -> HostError:
        if self._unreachable:
            return HostError(
                f"cannot get {name}, and it is not in the cache: {self._unreachable}",
                hint=_remedy(self._unreachable),
            )
        return HostError(
            f"the apt sources of this machine offer no package {name} for {self._architecture}",
            hint="give a file with Debian's sources: --sources FILE",
        )

    def _run(self, tool: str, *arguments: str) -> _Ran:
        """Run an apt tool to its end; a failure is for the caller to judge."""
        ours, theirs = os.pipe()
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        command = [tool, "-c", str(self._config), "-o", f"APT::Status-Fd={theirs}", *arguments]
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=self._root,  # apt-get download takes packages in its directory as fetched
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs, self._lock),
                )
            finally:
                os.close(theirs)
            with process, open(ours, encoding="ascii", errors="replace") as status:
                try:
                    for line in status:
                        if match := _STATUS.match(line):
                            self._progress.percent(float(match[1]))
                except BaseException:
                    process.terminate()
                    raise
            output.seek(0)
            said = output.read()
        if process.returncode == 0:
            return _Ran(said, "")
        complaints = re.findall(r"^[EW]: (.*)$", said, re.MULTILINE)
        problem = " ".join(complaints[0].split()) if complaints else f"{tool} ended with {process.returncode}"
        return _Ran(said, problem)
