"""The escape key of a terminal: what typed bytes mean. Pure, no I/O."""

from __future__ import annotations

import enum

#: Ctrl-A, as in QEMU.
ESCAPE = 0x01


class Command(enum.Enum):
    """What the person at the terminal asked for."""

    QUIT = "x"
    POWER_BUTTON = "p"
    HELP = "h"


HELP_TEXT = (
    "\r\n"
    "Ctrl-A x       end the virtual machine now\r\n"
    "Ctrl-A p       press its power button\r\n"
    "Ctrl-A Ctrl-A  send one Ctrl-A\r\n"
    "Ctrl-A h       this help\r\n"
)

_COMMANDS = {ord(letter): command for command in Command for letter in (command.value, command.value.upper())}
_COMMANDS[ord("?")] = Command.HELP


class EscapeFilter:
    """Splits what is typed into bytes for the guest and commands; keeps a prefix between calls."""

    def __init__(self) -> None:
        self._armed = False

    def feed(self, data: bytes) -> tuple[bytes, list[Command]]:
        """Returns (bytes for the guest, commands in order). An unknown key after Ctrl-A is eaten."""
        if not self._armed and ESCAPE not in data:
            return data, []
        plain, commands = bytearray(), []
        for byte in data:
            if not self._armed:
                if byte == ESCAPE:
                    self._armed = True
                else:
                    plain.append(byte)
                continue
            self._armed = False
            if byte == ESCAPE:
                plain.append(byte)
            elif byte in _COMMANDS:
                commands.append(_COMMANDS[byte])
        return bytes(plain), commands
