"""Which engine runs a guest, and what people are told about it."""

from __future__ import annotations

import logging

import pytest

from qvmcore.choose import choose_engine, survey
from qvmcore.engine import Guest, GuestConfig
from qvmcore.errors import EngineError, PluginError
from qvmcore.plugins import EntryInfo, PluginHost


class FakeEngine:
    """Says what the test wants."""

    def __init__(self, name: str, problem: object = "", *, native: bool = False) -> None:
        self.name, self.problem, self.native = name, problem, native

    def unusable(self, arch: str) -> str:
        if isinstance(self.problem, Exception):
            raise self.problem
        return str(self.problem)

    def create_guest(self, config: GuestConfig) -> Guest:
        raise NotImplementedError


class EngineHost(PluginHost):
    """Has the given engines; an engine that is an exception cannot be loaded."""

    def __init__(self, **engines: FakeEngine | PluginError) -> None:
        super().__init__(distributions=())
        self._engines = engines

    def engine_names(self) -> dict[str, EntryInfo]:
        return {name: EntryInfo(name, "qvm.engine.v1", f"qvm-{name}", "1") for name in sorted(self._engines)}

    def engine(self, name: str) -> FakeEngine:
        found = self._engines[name]
        if isinstance(found, PluginError):
            raise found
        return found


def emulated(problem: str = "") -> FakeEngine:
    return FakeEngine("emulated", problem)


def kvm(problem: str = "") -> FakeEngine:
    return FakeEngine("kvm", problem, native=True)


def chosen(host: PluginHost, caplog: pytest.LogCaptureFixture, wanted: str = "auto") -> tuple[str, str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "qvm"):
        name = choose_engine(host, wanted, "x86_64").name
    return name, caplog.messages[0] if caplog.messages else ""


def test_a_native_engine_comes_first_whatever_the_names(caplog: pytest.LogCaptureFixture) -> None:
    assert chosen(EngineHost(emulated=emulated(), kvm=kvm()), caplog) == ("kvm", "engine: kvm, native")


def test_the_log_says_why_a_better_engine_was_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    host = EngineHost(emulated=emulated(), kvm=kvm("no permission to open /dev/kvm; join the group kvm"))
    text = "engine: emulated (kvm: no permission to open /dev/kvm; join the group kvm)"
    assert chosen(host, caplog) == ("emulated", text)


def test_without_a_native_engine_the_log_says_that(caplog: pytest.LogCaptureFixture) -> None:
    text = "engine: emulated (no native engine is installed)"
    assert chosen(EngineHost(emulated=emulated()), caplog) == ("emulated", text)


@pytest.mark.parametrize(
    "broken",
    [PluginError("engine 'kvm' (qvm-kvm 1) cannot be used: ImportError"), FakeEngine("kvm", OSError("boom"))],
    ids=["not loaded", "unusable raises"],
)
def test_auto_passes_over_a_broken_engine(
    broken: FakeEngine | PluginError, caplog: pytest.LogCaptureFixture
) -> None:
    name, text = chosen(EngineHost(aaa=broken, emulated=emulated()), caplog)
    assert name == "emulated"
    assert "engine: emulated (aaa: " in text


def test_an_engine_asked_for_by_name_is_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert chosen(EngineHost(emulated=emulated(), kvm=kvm()), caplog, "emulated") == ("emulated", "")


def test_an_engine_asked_for_by_name_that_cannot_is_refused_with_its_reason() -> None:
    host = EngineHost(emulated=emulated(), kvm=kvm("no /dev/kvm; load the module kvm_intel"))
    with pytest.raises(EngineError) as caught:
        choose_engine(host, "kvm", "x86_64")
    assert str(caught.value) == (
        "engine 'kvm' cannot run this x86_64 guest: no /dev/kvm; load the module kvm_intel"
    )


def test_when_none_can_run_it_every_engine_is_named_with_reason_and_fix() -> None:
    host = EngineHost(emulated=emulated("it runs aarch64 guests, not x86_64"))
    with pytest.raises(EngineError) as caught:
        choose_engine(host, "auto", "x86_64")
    assert str(caught.value).splitlines() == [
        "no engine can run this x86_64 guest:",
        "  emulated: it runs aarch64 guests, not x86_64",
        "  kvm: not installed; pip install qvm-kvm",
    ]


def test_without_any_engine_the_error_says_what_to_install() -> None:
    with pytest.raises(EngineError, match="emulated: not installed; pip install qvm-emulator"):
        choose_engine(EngineHost(), "auto", "aarch64")


def test_the_survey_lists_all_with_their_distributions() -> None:
    host = EngineHost(zzz=kvm(), aaa=emulated("no"), bad=PluginError("cannot be used"))
    assert [(each.name, each.origin, each.native, each.problem) for each in survey(host, "aarch64")] == [
        ("zzz", "qvm-zzz 1", True, ""),
        ("aaa", "qvm-aaa 1", False, "no"),
        ("bad", "qvm-bad 1", False, "cannot be used"),
    ]
