"""JSONL line by line, and JSON value by value: neither a file nor a list is ever held whole."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from tunesmith.base import InputError, Source
from tunesmith.data.compressed import CHUNK, FileBytes
from tunesmith.data.read_text import UTF8, text_defect
from tunesmith.data.record import Record, RowErrors

JSONL = "every line of a JSONL file is one JSON object"
JSON = "a JSON file is a list of objects"
_COUNTED = f"{JSON}; the number counts objects from 1"
_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_TOKEN = 16
"""Characters of the longest piece that a block may cut so that it looks wrong: a pair of \\u escapes, and some more."""


class BrokenJson(ValueError):
    """What is wrong with a piece of JSON, and the line in which it is, counted from 1."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.line = line


class JsonDecoder:
    """Parses JSON and finds what every reader takes in another way: doubled names and half surrogate pairs."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._doubled: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            self._doubled = next(name for name in found if names.count(name) > 1)
        return found

    def line(self, text: str) -> Any:
        """The one value of a text.

        Raises:
            BrokenJson: saying what is wrong with it.
        """
        self._doubled = None
        try:
            value = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            raise BrokenJson(f"not JSON: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise BrokenJson("the value is nested too deeply") from error
        except ValueError as error:
            raise BrokenJson(str(error)) from error
        if defect := self.defect(value, text):
            raise BrokenJson(defect)
        return value

    def next(self, text: str, at: int) -> tuple[Any, int]:
        """The value that begins at ``at`` and where it ends; raises what `json` raises."""
        self._doubled = None
        return self._decoder.raw_decode(text, at)

    def defect(self, value: Any, text: str) -> str | None:
        """What is wrong with the value parsed last although it is JSON."""
        if self._doubled is not None:
            return f"the name {self._doubled!r} stands twice in one object"
        if re.search(r"\\u[dD][89a-fA-F]", text):
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return "half of a surrogate pair (\\ud800 to \\udfff) stands alone, which is no text"
        return None


def jsonl_records(file: FileBytes, errors: RowErrors) -> Iterator[Record]:
    """One object a line; empty lines are passed over."""
    decoder, fix = JsonDecoder(), ""
    with file.text("\n") as stream:
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            fix = fix or _jsonl_fix(line)
            source = Source(file.shown, number)
            if defect := text_defect(line):
                errors.add(source, defect, UTF8)
                continue
            try:
                value = decoder.line(line)
            except BrokenJson as error:
                errors.add(source, str(error), fix)
                continue
            if isinstance(value, dict):
                yield Record(value, source)
            else:
                errors.add(source, _no_object(value), fix)


def _jsonl_fix(first: str) -> str:
    whole = first.lstrip().startswith("[") or first.strip() == "{"
    return JSONL + ("; this looks like one JSON value over several lines: name the file .json" if whole else "")


def _no_object(value: Any) -> str:
    return f"expected an object with named fields, found {type(value).__name__}"


def json_records(file: FileBytes, errors: RowErrors) -> Iterator[Record]:
    """The objects of a JSON file: a list, an object around the only list of objects in it, or one object as one row.

    Lists are parsed value by value. A file that is one object is read twice, first for its shape; one that is a
    single row is held whole, as every row is. Objects one after the other are read as JSONL.

    Raises:
        InputError: when the file is neither, or holds several lists of rows.
    """
    try:
        with file.text(None) as stream:
            text = JsonText(stream)
            opening = text.peek()
            if opening == "[":
                yield from _list_records(text, file, errors)
                return
            if opening and opening != "{":
                value, _ = text.value()
                text.end()
                raise InputError(
                    f"expected a list of objects, found {type(value).__name__}", where=file.shown, fix=JSON
                )
            shape = _shape(text, file.shown) if opening else "nothing"
        if shape == "lines":
            yield from jsonl_records(file, errors)
        elif shape != "nothing":
            yield from _object_records(file, shape, errors)
    except BrokenJson as error:
        # What follows cannot be told apart from what is broken, so the rest of the file is not read.
        errors.add(Source(file.shown, error.line or 1), str(error), JSON)


class JsonText:
    """JSON taken piece by piece from a stream, of which about one value is held at a time."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream = stream
        self._decoder = JsonDecoder()
        self._buffer = ""
        self._at = 0
        self._line = 1
        self._ended = False

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            found = _SPACE.match(self._buffer, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                return ""
            self._read()

    def take(self, *expected: str) -> str:
        """Passes over one of the expected characters, and returns it."""
        if (found := self.peek()) not in expected or not found:
            raise self._broken(f"Expecting {' or '.join(map(repr, expected))}", self._at)
        self._at += 1
        return found

    def value(self) -> tuple[Any, str | None]:
        """The next value, and what is wrong with it although it is JSON.

        Raises:
            BrokenJson: when it is not.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.next(self._buffer, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - _LONGEST_TOKEN
                if self._ended or not cut:
                    raise self._broken(error.msg, error.pos) from error
            except RecursionError as error:
                raise self._broken("the value is nested too deeply", self._at) from error
            except ValueError as error:
                raise self._broken(str(error), self._at) from error
            else:
                if end < len(self._buffer) or self._ended:  # a number at the end of a block may go on in the next one
                    break
            self._read()
        piece = self._buffer[self._at : end]
        self._at = end
        return value, text_defect(piece) or self._decoder.defect(value, piece)

    def items(self) -> Iterator[tuple[Any, str | None]]:
        """The values of the list that begins here."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",", "]") == "]":
                return

    def end(self) -> None:
        """Raises BrokenJson unless nothing follows."""
        if self.peek():
            raise self._broken("Extra data", self._at)

    def _read(self) -> None:
        self._line += self._buffer.count("\n", 0, self._at)
        rest = self._buffer[self._at :]
        block = self._stream.read(max(CHUNK, len(rest)))  # doubling keeps a value of any length linear
        self._ended = not block
        self._buffer, self._at = rest + block, 0

    def _broken(self, what: str, at: int) -> BrokenJson:
        line = self._line + self._buffer.count("\n", 0, at)
        if "\0" in (around := self._buffer[at : at + 2]):
            return BrokenJson(text_defect(around) or what, line)
        column = at - self._buffer.rfind("\n", 0, at)
        return BrokenJson(f"not JSON: {what} at column {column}", line)


def _list_records(text: JsonText, file: FileBytes, errors: RowErrors) -> Iterator[Record]:
    yield from _checked(text.items(), file.shown, errors)
    text.end()


def _checked(items: Iterator[tuple[Any, str | None]], shown: str, errors: RowErrors) -> Iterator[Record]:
    for number, (value, defect) in enumerate(items, start=1):
        source = Source(shown, number)
        if defect:
            errors.add(source, defect, UTF8 if "UTF-8" in defect else _COUNTED)
        elif isinstance(value, dict):
            yield Record(value, source)
        else:
            errors.add(source, _no_object(value), _COUNTED)


def _shape(text: JsonText, shown: str) -> str:
    """What a file that begins with an object is: ``lines``, ``row``, or ``list:`` and the name of its list of rows."""
    lists, conversation, names = list[str](), False, set[str]()
    text.take("{")
    closing = text.take("}") if text.peek() == "}" else ""
    while not closing:
        name, _ = text.value()
        if not isinstance(name, str):
            raise BrokenJson("not JSON: Expecting property name enclosed in double quotes")
        if name in names:
            raise BrokenJson(f"the name {name!r} stands twice in one object")
        names.add(name)
        text.take(":")
        if text.peek() == "[":
            objects, turns = _describe(text)
            lists += [name] if objects else []
            conversation |= turns
        else:
            text.value()
        closing = text.take(",", "}") == "}"
    if text.peek():
        return "lines"
    if conversation or not lists:
        return "row"
    if len(lists) > 1:
        raise InputError(
            f"the object holds several lists of rows: {', '.join(lists)}",
            where=shown,
            fix="write each into a file of its own",
        )
    return f"list:{lists[0]}"


def _describe(text: JsonText) -> tuple[bool, bool]:
    """Whether a list holds objects only, and whether they are the turns of one conversation."""
    count, objects, turns = 0, True, False
    for value, _ in text.items():
        count += 1
        objects = objects and isinstance(value, dict)
        turns = turns or (count == 1 and isinstance(value, dict) and bool({"role", "from"} & value.keys()))
    return objects and count > 0, turns and objects


def _object_records(file: FileBytes, shape: str, errors: RowErrors) -> Iterator[Record]:
    with file.text(None) as stream:
        text = JsonText(stream)
        if shape == "row":
            yield from _checked(iter([text.value()]), file.shown, errors)
            return
        text.take("{")
        while True:
            name, _ = text.value()
            text.take(":")
            if name == shape.removeprefix("list:"):
                yield from _checked(text.items(), file.shown, errors)
                return
            text.value()
            text.take(",")
