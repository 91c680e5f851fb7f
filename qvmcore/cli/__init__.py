"""The command ``qvm`` (floor 10). :func:`main` turns every way a command can end into an exit code.

===  =====================================================================
0    done; for ``qvm run``: the guest ended by itself or by the power button
3-7  ``qvm run``: how the VM ended, see :class:`qvmcore.types.Reason`
64   wrong use of the command line, or fatal before the guest started
65   wrong VM file, or a wrong ``--set``
96   fatal after the guest started
===  =====================================================================

Nobody sees a traceback unless ``--debug`` or ``QVM_DEBUG=1`` asks for it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qvmcore.errors import ConfigError, for_people

if TYPE_CHECKING:
    from qvmcore.plugins import PluginHost

EXIT_USAGE = EXIT_BEFORE_START = 64
EXIT_CONFIG = 65
EXIT_AFTER_START = 96
_EXIT_INTERRUPTED = 130


def main(args: Sequence[str] | None = None, *, host: PluginHost | None = None) -> int:
    """Run one command and return the exit code. ``host`` replaces the installed plugins in tests."""
    import click

    from qvmcore.cli.root import qvm
    from qvmcore.cli.state import State

    state = State(host)
    try:
        result = qvm.main(args, prog_name="qvm", standalone_mode=False, obj=state)
        return result if isinstance(result, int) else 0
    except ConfigError as error:
        return _say(state, str(error), EXIT_CONFIG)
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        return _say(state, "qvm: interrupted", _EXIT_INTERRUPTED)
    except Exception as error:
        text = for_people(error)
        if not text:
            text = f"internal error: {type(error).__name__}: {error}"
            text += "" if state.debug else "; run it again with --debug to see where, and please report it"
        return _say(state, f"qvm: {text}", EXIT_AFTER_START if state.started else EXIT_BEFORE_START)


def _say(state: object, text: str, code: int) -> int:
    if getattr(state, "debug", False):
        traceback.print_exc()
    print(text, file=sys.stderr, flush=True)
    return code
