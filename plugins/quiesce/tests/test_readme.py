"""The README says what is true: options with their defaults, steps with their phases, commands, numbers."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from qvm_quiesce import cli, session, state, steps
from qvm_quiesce.evidence import Verdict
from qvm_quiesce.subject import Policy
from qvm_quiesce.vdev import QuiesceOptions

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_option_is_listed_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `([a-z-]+)` \| `?([^`|]*?)`? \|", README, re.MULTILINE))
    fields = {field.encode_name: field.default for field in msgspec.structs.fields(QuiesceOptions)}
    assert set(listed) == set(fields)
    for name, default in fields.items():
        shown = listed[name].strip()
        if isinstance(default, bool):
            assert shown == str(default).lower()
        elif isinstance(default, float):
            assert float(shown) == default, name
        else:
            assert shown == (default or "[]")


def test_every_step_is_listed_in_order_with_its_deadline() -> None:
    rows = re.findall(
        r"^\| (STOP_DMA|MASK_IRQ|FLUSH)? ?\| `([a-z-]+)`[^|]*\| ([^|]*) \|", README, re.MULTILINE
    )
    order = (*steps.STOP_DMA, *steps.MASK_AND_RESET, *steps.PROVE)
    assert [name for _, name, _ in rows] == [step.name for step in order]
    firsts = {phase: name for phase, name, _ in rows if phase}
    assert firsts == {
        "STOP_DMA": steps.STOP_DMA[0].name,
        "MASK_IRQ": steps.MASK_AND_RESET[0].name,
        "FLUSH": steps.PROVE[0].name,
    }
    names = {
        field.encode_name: field.default
        for field in msgspec.structs.fields(QuiesceOptions)
        if isinstance(field.default, float)
    }
    for (_, _, shown), step in zip(rows, order, strict=True):
        seconds = sum(names.get(word, 0.0) or float(word) for word in shown.split(" + "))
        assert seconds == step.deadline(Policy()), step.name


def test_commands_verdicts_and_numbers_are_those_of_the_code() -> None:
    for name in cli.quiesce.commands:
        assert re.search(rf"^\| `qvm quiesce {name}\b", README, re.MULTILINE), name
    for verdict in Verdict:
        assert f"`{verdict.value}`:" in README
    assert f"the last {state.KEPT} records" in README
    assert f"at most {session.RESTARTS} times a minute" in README and session.RESTART_SECONDS == 60
    assert f"Of more than {Policy().watch_bytes >> 20} MiB" in README
    assert f"exit code {cli.NOT_QUIET} unless" in README
