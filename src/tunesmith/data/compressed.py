"""Bytes of a file, compressed or not, as a stream that is never held whole."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, cast

from tunesmith.base import InputError

CHUNK = 1 << 20
"""Bytes read at a time."""

BOM = codecs.BOM_UTF8
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
"""Marks of encodings that are not read; UTF-32's begin with UTF-16's, so they come first."""


class _ZstandardFrames(io.RawIOBase):
    """The frames of a .zst file through the `zstandard` package; a frame that is cut off is an EOFError.

    The package's own stream reader takes the end of a cut file for the end of its data.
    """

    def __init__(self, raw: IO[bytes], module: Any) -> None:
        self._raw, self._module = raw, module
        self._frame: Any = None
        self._left = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            if not (block := self._left or self._raw.read(CHUNK)):
                if self._frame is not None:
                    raise EOFError("the compressed file ends before its end-of-stream marker was reached")
                return 0
            self._ready = memoryview(self._decompressed(block))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompressed(self, block: bytes) -> bytes:
        self._frame = self._frame or self._module.ZstdDecompressor().decompressobj()
        try:
            data: bytes = self._frame.decompress(block)
        except self._module.ZstdError as error:
            raise OSError(str(error)) from error
        self._left = b""
        if self._frame.eof:
            self._left = self._frame.unused_data
            self._frame = None
        return data


def _zstandard(raw: IO[bytes]) -> io.RawIOBase:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return cast(io.RawIOBase, zstd.ZstdFile(raw))
    if find_spec("zstandard") is None:
        raise InputError(
            "a .zst file needs the package zstandard, which is not installed",
            fix="pip install zstandard, or compress the file as .gz, .bz2 or .xz",
        )
    import importlib

    return _ZstandardFrames(raw, importlib.import_module("zstandard"))


COMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstandard,
}


@contextmanager
def whole_file(shown: str) -> Iterator[None]:
    """Turns what a damaged or unreadable file raises into an InputError."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        said = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(f"cannot be read: {said}", where=shown, fix="check that the file is whole") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # of compression.zstd, a module that older Pythons do not have
            raise
        raise InputError(f"cannot be read: {error}", where=shown, fix="check that the file is whole") from error


class FileBytes:
    """A file that can be read from its beginning several times, as bytes or as text.

    Args:
        file: the file.
        shown: its name in messages.
        compression: one of `COMPRESSED`, or nothing.
    """

    def __init__(self, file: Path, shown: str, compression: str = "") -> None:
        self.file, self.shown, self.compression = file, shown, compression
        self.size = file.stat().st_size
        self._raw: IO[bytes] | None = None
        self._done = 0

    def position(self) -> tuple[int, int]:
        """Bytes of the file (as it is stored) that were read, and how many there are."""
        if self._raw is not None and not self._raw.closed:
            self._done = self._raw.tell()
        return self._done, self.size

    @contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        """Opens the decompressed bytes; what is raised inside the block names the file."""
        with whole_file(self.shown), open(self.file, "rb") as raw:
            self._raw = raw
            opened = COMPRESSED[self.compression](raw) if self.compression else raw
            yield opened if opened is raw else io.BufferedReader(opened, CHUNK)
            self._done = raw.tell()

    @contextmanager
    def text(self, newline: str | None) -> Iterator[io.TextIOWrapper]:
        """Opens the file as UTF-8 without its mark; a byte that is no UTF-8 becomes U+DC80 to U+DCFF.

        Args:
            newline: as in the built-in ``open``.
        """
        with self.open() as stream:
            yield io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=newline)

    def marked(self) -> bool:
        """Whether the text begins with UTF-8's byte-order mark.

        Raises:
            InputError: for the marks of UTF-16 and UTF-32.
        """
        with self.open() as stream:
            head = stream.read(4)
        for mark, name in _OTHER_MARKS:
            if head.startswith(mark):
                raise InputError(
                    f"this is {name}, by its byte-order mark", where=f"{self.shown}:1", fix="save the file as UTF-8"
                )
        return head.startswith(BOM)
