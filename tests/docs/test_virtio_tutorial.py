"""The tutorial of plugins/virtio_entropy: every snippet is executed, in its order, in a fresh environment."""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
import venv
from pathlib import Path

PLUGIN = Path(__file__).resolve().parents[2] / "plugins" / "virtio_entropy"
TUTORIAL = (PLUGIN / "README.md").read_text()
#: (file name or "", language, text) of every block, in order.
BLOCKS = [
    (name, language, text)
    for name, language, text in re.findall(
        r"(?:^`([\w./]+)`:\n\n)?^```(\w+)\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL
    )
]


def _environment(folder: Path) -> dict[str, str]:
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


def test_every_snippet_runs_in_order(tmp_path: Path) -> None:
    environment = _environment(tmp_path / "venv")
    project = tmp_path / "project"
    (project / "guest").mkdir(parents=True)
    for name in ("vmlinuz", "initramfs.cpio.gz"):
        (project / "guest" / name).write_bytes(bytes(64))
    namespace: dict[str, object] = {"__name__": "tutorial"}
    printed = ""
    for name, language, text in BLOCKS:
        if name:
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            (project / name).write_text(text)
        elif language == "python":
            exec(compile(text, str(PLUGIN / "README.md"), "exec"), namespace)
        elif language == "sh":
            done = subprocess.run(
                ["sh", "-ec", text], cwd=project, env=environment, capture_output=True, text=True
            )
            printed += done.stdout
            assert done.returncode == 0, f"{text}{done.stdout}{done.stderr}"
        else:
            assert language == "console", f"a block of the unknown kind {language}"
    assert "max_bytes" in printed and " passed" in printed
    where = [sys.executable, "-c", "import qvm_virtio_entropy; print(qvm_virtio_entropy.__file__)"]
    where[0] = str(tmp_path / "venv" / "bin" / "python")
    used = subprocess.run(where, capture_output=True, text=True, check=True).stdout
    assert str(project) in used, "the package of the tutorial was used, not the installed one"


def test_the_files_shown_are_the_files_shipped() -> None:
    shown = {name: text for name, _, text in BLOCKS if name}
    assert set(shown) == {
        "qvm_virtio_entropy/__init__.py", "pyproject.toml", "tests/test_conformance.py", "vm.toml",
    }  # fmt: skip
    for name, text in shown.items():
        if name != "vm.toml":
            assert (PLUGIN / name).read_text() == text, name


def test_it_is_short() -> None:
    assert len((PLUGIN / "qvm_virtio_entropy" / "__init__.py").read_text().splitlines()) <= 60
    assert len((PLUGIN / "tests" / "test_conformance.py").read_text().splitlines()) <= 30
