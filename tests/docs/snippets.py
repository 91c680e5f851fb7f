"""Executes the code blocks of a document, in their order, as a reader would type them."""

from __future__ import annotations

import os
import re
import site
import subprocess
import venv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(r"(?:^`([\w./]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block; ``name`` is the file it is to be written to, empty for one that is executed."""

    name: str
    language: str
    text: str


def blocks(document: str) -> list[Block]:
    """Every block of a document. A line with just a file name in backquotes names the next one."""
    return [Block(*found) for found in _BLOCK.findall(document)]


def environment(folder: Path) -> dict[str, str]:
    """A new virtual environment that sees what is installed here; pip needs no network in it."""
    venv.create(folder, symlinks=True)
    bin_dir = folder / "bin"
    library = next((folder / "lib").glob("python*/site-packages"))
    seen = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (library / "here.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in seen))
    qvm = bin_dir / "qvm"
    qvm.write_text(f"#!{bin_dir}/python\nfrom qvmcore.cli import main\n\nmain()\n")
    qvm.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(folder),
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as "no isolation": the build tools are installed
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def run(parts: Iterable[Block], project: Path, variables: dict[str, str], document: Path) -> str:
    """Write the files into ``project``, run the Python here and the shell there; what the shell printed.

    Blocks of the kind ``console`` are for a guest and are not run.
    """
    (project / "guest").mkdir(parents=True)
    for name in ("vmlinuz", "initramfs.cpio.gz"):
        (project / "guest" / name).write_bytes(bytes(64))
    namespace: dict[str, object] = {"__name__": "snippets"}
    printed = ""
    for name, language, text in parts:
        if name:
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            (project / name).write_text(text)
        elif language == "python":
            exec(compile(text, str(document), "exec"), namespace)
        elif language == "sh":
            done = subprocess.run(
                ["sh", "-ec", text], cwd=project, env=variables, capture_output=True, text=True
            )
            printed += done.stdout
            assert done.returncode == 0, f"{text}{done.stdout}{done.stderr}"
        else:
            assert language == "console", f"a block of the unknown kind {language}"
    return printed
