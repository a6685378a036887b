"""A file of results that survives a kill at any moment, and the run that goes on with it.

JSON Lines, in ASCII. The first line is the header: `decides`, all that the results depend
on, `run_key`, its SHA-256, and `about`, what is good to know besides. Every further line is
one record with an `id`, on the disk before `append` returns. Of two records with one id
the later counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
HEADER_BEGINS = b'{"schema":'
REPLACE_TRIES = 20  # Windows lets nobody replace a file that somebody reads
REPLACE_PAUSE_S = 0.1

Record = dict[str, Any]


class JournalError(Exception):
    """In words for the user."""


class OtherRun(JournalError):
    """The file holds results of a run that something decided otherwise."""

    def __init__(self, path: Path, differences: list[str]) -> None:
        self.differences = differences
        shown = "\n  ".join(differences)
        super().__init__(f"{path} is of another run; then and now differ in\n  {shown}")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file of results holds. `broken` are numbers of lines, from 1, without those
    of a torn end; `whole_bytes` is the length without a torn end."""

    header: Record
    records: dict[str, Record]
    repeated: int  # records whose id came again
    broken: tuple[int, ...]
    whole_bytes: int


def run_key(decides: Mapping[str, Any]) -> str:
    """SHA-256, in hex, over everything that decides the results."""
    canonical = json.dumps(decides, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def as_line(value: Mapping[str, Any]) -> bytes:
    """One line of ASCII, keys as they come: no character of a text can end it early."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def differences(then: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> list[str]:
    """Each field that differs, with both values: `sampling.seed: 1, now 2`."""
    found = []
    for name in sorted({*then, *now}):
        old, new = then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{above}{name}.")
            continue
        was, is_ = (json.dumps(each[name]) if name in each else "nothing" for each in (then, now))
        if was != is_:
            found.append(f"{above}{name}: {was}, now {is_}")
    return found


def read(path: Path) -> Contents:
    """The file as it is now, also while a run appends to it.

    A line at the end that is not whole is left out. Raises JournalError if there is no
    header, or OSError.
    """
    data = path.read_bytes()
    *lines, torn = data.split(b"\n")  # not splitlines: that ends a line at other bytes too
    if not lines:
        raise JournalError(f"{path} has no header")
    header = _parsed(lines[0])
    if header is None or header.get("schema") != SCHEMA or not _is_object(header, "decides"):
        raise JournalError(f"{path} is no file of results: its first line is no header")
    records: dict[str, Record] = {}
    broken, repeated = [], 0
    for number, line in enumerate(lines[1:], 2):
        record = _parsed(line)
        if record is None or not isinstance(record.get("id"), str):
            broken.append(number)
            continue
        repeated += record["id"] in records
        records[record["id"]] = record
    return Contents(header, records, repeated, tuple(broken), len(data) - len(torn))


def _is_object(header: Record, name: str) -> bool:
    return isinstance(header.get(name), dict)


def _parsed(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class Journal:
    """The one writer of a file of results. Use it with `with opened(...)`.

    The file is open only while a line is written: Windows moves no file that is open.
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        self.path = path
        self.header = contents.header
        self.records = contents.records
        self.repeated = contents.repeated

    def append(self, record: Record) -> None:
        """Write one record to the disk. Raises OSError, and then has written nothing of it."""
        _append(self.path, as_line(record))
        self.repeated += record["id"] in self.records
        self.records[record["id"]] = record


def _append(path: Path, line: bytes) -> None:
    with _opened_to_append(path) as descriptor:
        end = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, line)
            if written != len(line):
                raise OSError(f"{path}: only {written} of {len(line)} bytes fitted")
            os.fsync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, end)
            raise


@contextlib.contextmanager
def _opened_to_append(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened(
    path: Path,
    decides: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    is_new_run: bool = False,
    is_repair: bool = False,
) -> Iterator[Journal]:
    """Go on with the run in this file, or begin one; nobody else may write meanwhile.

    A torn end is cut off. With `is_new_run` the file of another run is set aside instead
    of refused; with `is_repair` broken lines go to a file that ends in .bad.

    Raises OtherRun, JournalError (somebody else writes; broken lines) or OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"schema": SCHEMA, "run_key": run_key(decides), "decides": decides, "about": about}
    with locked(path):
        if not _has_header(path):
            write_whole(path, as_line(header))
        contents = read(path)
        if contents.header.get("run_key") != header["run_key"]:
            if not is_new_run:
                raise OtherRun(path, differences(contents.header["decides"], decides))
            set_aside(path)
            write_whole(path, as_line(header))
            contents = read(path)
        if contents.broken:
            if not is_repair:
                raise JournalError(
                    f"{path}: line {contents.broken[0]} is broken; --repair drops it"
                )
            _repair(path, contents.broken)
            contents = read(path)
        _cut_off(path, contents.whole_bytes)
        yield Journal(path, contents)


def _cut_off(path: Path, whole_bytes: int) -> None:
    with _opened_to_append(path) as descriptor:
        if os.fstat(descriptor).st_size != whole_bytes:
            os.ftruncate(descriptor, whole_bytes)
            os.fsync(descriptor)


def _has_header(path: Path) -> bool:
    """False also where a header never became whole: nothing is lost with it.

    Any other text without an end of line is somebody's file, and not written over.
    """
    try:
        with path.open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return False
    return line.endswith(b"\n") or line[: len(HEADER_BEGINS)] != HEADER_BEGINS[: len(line)]


def set_aside(path: Path) -> Path:
    """Give the file a free name beside its own: run.jsonl becomes run.1.jsonl."""
    for number in range(1, 10_000):
        other = path.with_name(f"{path.stem}.{number}{path.suffix}")
        if not other.exists():
            path.rename(other)
            return other
    raise JournalError(f"too many old runs beside {path}")


def _repair(path: Path, broken: tuple[int, ...]) -> None:
    lines = path.read_bytes().split(b"\n")
    bad = path.with_name(path.name + ".bad")
    with bad.open("ab") as file:
        file.writelines(lines[number - 1] + b"\n" for number in broken)
    write_whole(path, b"\n".join(line for n, line in enumerate(lines, 1) if n not in broken))


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file so that every reader, and who comes after a crash, sees it old or new.

    Blocks for up to 2 s where Windows keeps a reader's file. Raises OSError.
    """
    part = path.with_name(path.name + ".tmp")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    for tries_left in reversed(range(REPLACE_TRIES)):
        try:
            part.replace(path)
            break
        except PermissionError:
            if not tries_left or sys.platform != "win32":
                raise
            time.sleep(REPLACE_PAUSE_S)
    if sys.platform != "win32":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold .NAME.lock beside the file; a lock ends with its process, so the file may stay.

    Raises JournalError at once if somebody else holds it.
    """
    file = path.with_name(f".{path.name}.lock")
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _lock(descriptor)
        except OSError:
            raise JournalError(f"another run writes {path} at this moment") from None
        yield
    finally:
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        """Raises OSError at once if somebody holds it."""
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        """Raises OSError at once if somebody holds it."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
