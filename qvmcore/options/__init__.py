"""From a table of a VM file to a typed options struct (floor 1).

Options are one frozen ``msgspec.Struct`` per vdev. :func:`convert_options` converts field by field
and reports *every* problem, in people's words; :func:`describe_options` tells what the fields are,
for ``qvm vdev TYPE``. ``-`` and ``_`` mean the same in keys.

Fields may be bool, int, float, str, Literal, Enum, Size, Address, HostPath, IntrSpec,
another Struct, and lists, tuples, dicts and unions of these; anything else is left to msgspec.
A value from the command line is a :class:`CommandLineText`, which may spell any scalar as text.
"""

from qvmcore.options.convert import (
    OptionInfo,
    OptionProblem,
    convert_options,
    describe_options,
)
from qvmcore.options.fields import CommandLineText, HostPath
from qvmcore.options.units import (
    Address,
    Size,
    format_size,
    parse_address,
    parse_bool,
    parse_number,
    parse_size,
)

__all__ = [
    "Address",
    "CommandLineText",
    "HostPath",
    "OptionInfo",
    "OptionProblem",
    "Size",
    "convert_options",
    "describe_options",
    "format_size",
    "parse_address",
    "parse_bool",
    "parse_number",
    "parse_size",
]
