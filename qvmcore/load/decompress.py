"""Bounded decompression of kernels (floor 8): a file of a few kilobytes can never fill the host.

Every method stops as soon as the output passes the limit. ``zstd`` comes with Python 3.14, before
that with the PyPI package ``zstandard``.
"""

from __future__ import annotations

import lzma
import zlib
from pathlib import Path

from qvmcore.errors import QvmError


def decompress(method: str, data: bytes, limit: int, path: Path) -> bytes:
    """The content of ``data``, at most ``limit`` bytes; ``path`` names the file in errors.

    Methods are those of Linux' EFI zboot images: gzip, lzma, xz, xzkern, zstd. Raises QvmError for
    another method, for damaged data and for a content larger than the limit.
    """
    try:
        if method == "gzip":
            content, complete = _gzip(data, limit)
        elif method in ("lzma", "xz", "xzkern"):
            content, complete = _lzma(data, limit)
        elif method == "zstd":
            content, complete = _zstd(data, limit, path)
        else:
            raise QvmError(f"{path}: compressed with {method!r}", hint="gzip, lzma, xz and zstd can be read")
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise QvmError(f"{path}: damaged {method} data: {error}", hint="get the file again") from error
    if len(content) > limit:
        raise QvmError(f"{path}: the decompressed kernel is larger than the guest's RAM ({limit} bytes)")
    if not complete:
        raise QvmError(f"{path}: damaged {method} data: it ends too early", hint="get the file again")
    return content


def _gzip(data: bytes, limit: int) -> tuple[bytes, bool]:
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    return unpacker.decompress(data, limit + 1), unpacker.eof


def _lzma(data: bytes, limit: int) -> tuple[bytes, bool]:
    unpacker = lzma.LZMADecompressor(memlimit=1 << 28)
    return unpacker.decompress(data, limit + 1), unpacker.eof


def _zstd(data: bytes, limit: int, path: Path) -> tuple[bytes, bool]:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return _zstandard(data, limit, path)
    unpacker = zstd.ZstdDecompressor()
    try:
        return unpacker.decompress(data, limit + 1), unpacker.eof
    except zstd.ZstdError as error:
        raise zlib.error(str(error)) from error


def _zstandard(data: bytes, limit: int, path: Path) -> tuple[bytes, bool]:
    try:
        import zstandard  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise QvmError(
            f"{path}: compressed with zstd, which this Python cannot read", hint="pip install zstandard"
        ) from None
    try:
        reader = zstandard.ZstdDecompressor().stream_reader(data)
        content = bytes(reader.read(limit + 1))
    except zstandard.ZstdError as error:
        raise zlib.error(str(error)) from error
    return content, True
