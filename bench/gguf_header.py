"""What the header of a GGUF file says, above all whether there is an MTP head in it.

The layout is that of docs/gguf.md in ggml, versions 2 and 3. The file may be cut short or
made to hurt: every count and length is checked against the file before it is followed,
nothing that is not kept is read into memory, and the work is bounded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MOST_FIELDS: Final = 65_536
MOST_TENSORS: Final = 262_144
MOST_KEY_BYTES: Final = 65_535  # as in ggml
MOST_NAME_BYTES: Final = 64  # of a tensor, as in ggml
MOST_DIMENSIONS: Final = 4
MOST_KEPT_BYTES: Final = 256  # a longer text, such as a chat template, is passed over
MOST_TEXTS: Final = 4_000_000  # in all lists together; vocabularies have some 250,000

Value = int | float | bool | str


class BadHeader(Exception):
    """The file is no GGUF, or a broken one; in words for the user."""


@dataclasses.dataclass(frozen=True)
class Header:
    """`fields` are numbers and short texts only; lists are left out."""

    version: int
    fields: Mapping[str, Value]
    tensors: tuple[str, ...]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", ""))

    @property
    def mtp_layers(self) -> int:
        """Layers that predict further tokens, by `<arch>.nextn_predict_layers`.

        0 also where the field stands and the tensors do not: some quantised files lack them.
        Of a file in several parts only the first is read, so there the field alone counts.
        """
        layers = self.fields.get(f"{self.architecture}.nextn_predict_layers", 0)
        if not isinstance(layers, int) or layers < 1:
            return 0
        parts = self.fields.get("split.count", 1)
        is_whole = not isinstance(parts, int) or parts <= 1
        has_tensors = any(".nextn." in name for name in self.tensors)
        return layers if has_tensors or not is_whole else 0


def read(path: Path) -> Header:
    """Raises BadHeader, or OSError."""
    with path.open("rb") as file:
        return _Reader(file, path.stat().st_size).header()


_FIXED: Final[Mapping[int, str]] = {  # enum gguf_type
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_TEXT, _LIST = 8, 9


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size  # bytes behind the place that has been reached
        self._texts_left = MOST_TEXTS

    def header(self) -> Header:
        if self._left < len(MAGIC) or self._bytes(len(MAGIC)) != MAGIC:
            raise BadHeader("it is no GGUF file: it does not begin with GGUF")
        version = self._number("<I")
        if version not in VERSIONS:
            raise BadHeader(f"GGUF version {version} is not known")
        tensors = self._count("tensors", MOST_TENSORS)
        fields = self._count("fields", MOST_FIELDS)
        kept: dict[str, Value] = {}
        for _ in range(fields):
            name = self._text("the name of a field", MOST_KEY_BYTES)
            value = self._value()
            if value is not None:
                kept[name] = value
        return Header(version, kept, tuple([self._tensor() for _ in range(tensors)]))

    def _value(self) -> Value | None:
        """None for what is passed over."""
        kind = self._number("<I")
        if kind == _TEXT:
            return self._short_text()
        if kind == _LIST:
            self._pass_list()
            return None
        return self._scalar(self._layout(kind))

    def _layout(self, kind: int) -> str:
        layout = _FIXED.get(kind)
        if layout is None:
            raise BadHeader(f"a value is of the unknown type {kind}")
        return layout

    def _short_text(self) -> str | None:
        size = self._number("<Q")
        if size <= MOST_KEPT_BYTES:
            return self._bytes(size).decode("utf-8", "replace")
        self._skip(size)
        return None

    def _pass_list(self) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        if kind != _TEXT:
            self._skip(count * struct.calcsize(self._layout(kind)))
            return
        if count > self._texts_left:
            raise BadHeader(f"a list of {count} texts is too long")
        self._texts_left -= count
        for _ in range(count):
            self._skip(self._number("<Q"))

    def _tensor(self) -> str:
        name = self._text("the name of a tensor", MOST_NAME_BYTES)
        dimensions = self._number("<I")
        if dimensions > MOST_DIMENSIONS:
            raise BadHeader(f"a tensor of {dimensions} dimensions")
        self._skip(8 * dimensions + 4 + 8)  # sizes, type, offset
        return name

    def _text(self, what: str, most: int) -> str:
        size = self._number("<Q")
        if size > most:
            raise BadHeader(f"{what} has {size} bytes")
        return self._bytes(size).decode("utf-8", "replace")

    def _count(self, what: str, most: int) -> int:
        count = self._number("<Q")
        if count > most:
            raise BadHeader(f"{count} {what} are too many")
        return count

    def _number(self, layout: str) -> int:
        return int(self._scalar(layout))

    def _scalar(self, layout: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]
        return value

    def _bytes(self, size: int) -> bytes:
        self._take(size)
        data = self._file.read(size)
        if len(data) != size:
            raise BadHeader("it became shorter while it was read")
        return data

    def _skip(self, size: int) -> None:
        self._take(size)
        self._file.seek(size, 1)

    def _take(self, size: int) -> None:
        if size > self._left:
            raise BadHeader("it ends within its header")
        self._left -= size


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gguf_header",
        description="Tell what the header of a GGUF file says, and how many MTP layers it has.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    file: Path = parser.parse_args(argv).file
    try:
        header = read(file)
    except (BadHeader, OSError) as exc:
        print(f"{file}: {exc}", file=sys.stderr)
        return 1
    said = {"architecture": header.architecture, "mtp_layers": header.mtp_layers}
    print(json.dumps(said | {"tensors": len(header.tensors)} | dict(header.fields), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
