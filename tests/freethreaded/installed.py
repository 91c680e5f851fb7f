"""Our distributions in an environment of another Python, without pip.

The environment is a small one on top of that which ``build.py`` has made. Our code is that of this working
copy; what says that it is there (versions, the entry points of plugins) is copied from the environment that
the tests run in.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FILES = ("METADATA", "entry_points.txt")
_SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"


def install(python: Path, folder: Path) -> Path:
    """The Python of a new environment in ``folder`` with all that ``python`` has, and us."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    ours = folder / "bin" / "python"
    site = _site(ours)
    projects = [ROOT, *ROOT.glob("plugins/*"), *ROOT.glob("examples/*")]
    paths = [*(path for path in projects if (path / "pyproject.toml").is_file()), _site(python)]
    (site / "qvm.pth").write_text("".join(f"{path}\n" for path in paths))
    for distribution in importlib.metadata.distributions():
        name = distribution.name.replace("-", "_")
        if name == "qvmcore" or name.startswith("qvm_"):
            _announce(distribution, site / f"{name}-{distribution.version}.dist-info")
    return ours


def _announce(distribution: importlib.metadata.Distribution, place: Path) -> None:
    place.mkdir(exist_ok=True)
    for file in _FILES:
        text = distribution.read_text(file)
        if text is not None:
            (place / file).write_text(text)


def _site(python: Path) -> Path:
    asked = subprocess.run([python, "-c", _SITE], check=True, capture_output=True, text=True)
    return Path(asked.stdout.strip())
