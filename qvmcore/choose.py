"""Which engine runs a guest (floor 8): every installed one is asked, native ones first."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from qvmcore.engine import Engine
from qvmcore.errors import EngineError, PluginError
from qvmcore.plugins import KNOWN, PluginHost

log = logging.getLogger("qvm")

#: The project's own engines and what brings them, for the hint of an error; native ones first.
DISTRIBUTIONS = {name: KNOWN[name] for name in ("kvm", "emulated")}


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine and what it says about a guest's architecture.

    ``problem`` says why it cannot be used, and what to do; empty when it can. ``engine`` is None when
    its plugin cannot be loaded.
    """

    name: str
    origin: str
    native: bool
    problem: str
    engine: Engine | None


def survey(host: PluginHost, arch: str) -> list[Candidate]:
    """Every installed engine, the preferred first: native ones, then by name. Never raises."""
    found = [_ask(host, name, entry.origin, arch) for name, entry in host.engine_names().items()]
    return sorted(found, key=lambda each: (not each.native, each.name))


def choose_engine(host: PluginHost, wanted: str, arch: str) -> Engine:
    """The engine a VM file asks for; for ``auto`` the first of :func:`survey` that can run ``arch``.

    Raises EngineError, or PluginError for an engine asked for by name that cannot be loaded.
    """
    if wanted != "auto":
        engine = host.engine(wanted)
        problem = _problem(engine, arch)
        if problem:
            raise EngineError(f"engine {wanted!r} cannot run this {arch} guest: {problem}")
        return engine
    passed_over: list[str] = []
    for each in survey(host, arch):
        if each.engine is not None and not each.problem:
            log.info("engine: %s", _why(each, passed_over))
            return each.engine
        passed_over.append(f"{each.name}: {each.problem}")
    missing = [
        f"{name}: not installed; pip install {package}"
        for name, package in DISTRIBUTIONS.items()
        if name not in host.engine_names()
    ]
    reasons = "".join(f"\n  {line}" for line in (*passed_over, *missing))
    raise EngineError(f"no engine can run this {arch} guest:{reasons}")


def _ask(host: PluginHost, name: str, origin: str, arch: str) -> Candidate:
    try:
        engine = host.engine(name)
    except PluginError as error:
        return Candidate(name, origin, False, str(error), None)
    # An engine made before the attribute existed is not native.
    return Candidate(name, origin, bool(getattr(engine, "native", False)), _problem(engine, arch), engine)


def _problem(engine: Engine, arch: str) -> str:
    try:
        return engine.unusable(arch)
    except Exception as error:
        # A fault of one engine must not keep the others from being asked.
        return f"its unusable() raised {type(error).__name__}: {error}; please report it"


def _why(chosen: Candidate, passed_over: list[str]) -> str:
    if passed_over:
        return f"{chosen.name} ({'; '.join(passed_over)})"
    return f"{chosen.name}, native" if chosen.native else f"{chosen.name} (no native engine is installed)"
