"""The questions: pinned files, downloaded once and checked whenever they are read.

They are kept in the user's cache folder, never in the work tree. `Source(data_dir=...)`
takes copies at hand instead, which must have the same sums:

    DIR/gsm8k/test.jsonl
    DIR/humaneval/HumanEval.jsonl.gz
    DIR/mmlu/data.tar, DIR/mmlu/mmlu-test-dev.tar.xz, or DIR/mmlu/data/{dev,test}/*.csv
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path, PurePosixPath

GSM8K_ROWS = 1319
HUMANEVAL_ROWS = 164
MMLU_SUBJECTS = 57
MMLU_TEST_ROWS = 14042
MMLU_DEV_ROWS = 285
CHOICES = 4
LETTERS = "ABCD"

# Sums over the parsed rows, whatever the quoting of the files: see `content_digest`.
MMLU_TEST_DIGEST = "34efe70b0eaa5c7b3df5930e738efb9632ead6807689ee39f4703ce2b3306d78"
MMLU_DEV_DIGEST = "e4a0cc42063dad4233e4c0bf1ebbce2228892c83b8f28a958850a01dcfec48c3"

PIECE_BYTES = 1 << 20
DOWNLOAD_TIMEOUT_S = 60.0  # without a byte
MAX_MEMBER_BYTES = 16 << 20
MAX_MEMBERS = 10_000
MMLU_MEMBER = re.compile(r"(?:\./)?data/(dev|test)/([a-z0-9_]+?)(?:_\1)?\.csv")


class DataError(Exception):
    """In words for the user."""


@dataclasses.dataclass(frozen=True)
class PinnedFile:
    """`name` is its place below the cache folder and below --data-dir."""

    name: str
    urls: tuple[str, ...]  # the same file; the next one is asked if one fails
    sha256: str
    max_bytes: int


GSM8K = PinnedFile(
    "gsm8k/test.jsonl",
    (
        (
            "https://raw.githubusercontent.com/openai/grade-school-math/"
            "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl"
        ),
    ),
    "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    4 << 20,
)
HUMANEVAL = PinnedFile(
    "humaneval/HumanEval.jsonl.gz",
    (
        (
            "https://raw.githubusercontent.com/openai/human-eval/"
            "6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz"
        ),
    ),
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    1 << 20,
)
MMLU = PinnedFile(
    "mmlu/data.tar",
    (
        "https://people.eecs.berkeley.edu/~hendrycks/data.tar",
        (
            "https://huggingface.co/datasets/cais/mmlu/resolve/"
            "c30699e8356da336a370243923dbaf21066bb9fe/data.tar"
        ),
    ),
    "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b",
    256 << 20,
)
MMLU_COPIES = ("mmlu/data.tar", "mmlu/mmlu-test-dev.tar.xz", "mmlu/data")


@dataclasses.dataclass(frozen=True)
class Sum:
    """A question of GSM8K. `gold` is a whole number in digits, with its sign."""

    index: int
    question: str
    answer: str  # as published: a way there, and #### with the number
    gold: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """A question of MMLU; all texts without blanks at their ends."""

    subject: str
    index: int
    question: str
    choices: tuple[str, ...]
    gold: str  # a letter

    def row(self) -> list[str]:
        return [self.question, *self.choices, self.gold]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One of HumanEval."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


@dataclasses.dataclass(frozen=True)
class Mmlu:
    test: dict[str, list[Choice]]  # by subject, in the order of names
    dev: dict[str, list[Choice]]

    def sha256(self) -> str:
        """Over both digests."""
        both = content_digest(self.test) + content_digest(self.dev)
        return hashlib.sha256(both.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Source:
    """Where files come from: `data_dir` if it is given, else the cache and the network."""

    data_dir: Path | None = None

    def file(self, pinned: PinnedFile) -> Path:
        """A checked copy on this machine. May download for minutes. Raises DataError."""
        if self.data_dir is None:
            return fetched(pinned, cache_dir())
        path = self.data_dir / pinned.name
        check_sum(path, pinned)
        return path

    def gsm8k(self) -> list[Sum]:
        rows = _json_rows(self.file(GSM8K).read_bytes(), GSM8K.name)
        _check_count(GSM8K.name, len(rows), GSM8K_ROWS)
        return [_sum(index, row) for index, row in enumerate(rows)]

    def humaneval(self) -> list[Problem]:
        data = gzip.decompress(self.file(HUMANEVAL).read_bytes())
        rows = _json_rows(data, HUMANEVAL.name)
        _check_count(HUMANEVAL.name, len(rows), HUMANEVAL_ROWS)
        names = [field.name for field in dataclasses.fields(Problem)]
        return [Problem(**{name: row[name] for name in names}) for row in rows]

    def mmlu(self) -> Mmlu:
        path = self._mmlu_path()
        found = _read_mmlu(path)
        _check_mmlu(path, found)
        return found

    def _mmlu_path(self) -> Path:
        if self.data_dir is None:
            return self.file(MMLU)
        for name in MMLU_COPIES:
            path = self.data_dir / name
            if path.exists():
                if name == MMLU.name:
                    check_sum(path, MMLU)
                return path
        raise DataError(f"{self.data_dir} has none of {', '.join(MMLU_COPIES)}")


def cache_dir() -> Path:
    """Where downloads are kept: beside the user's other caches, outside the work tree."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        parent = Path(base) if base else Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        parent = Path(base) if base else Path.home() / ".cache"
    return parent / "llama-sidecar" / "eval"


def fetched(pinned: PinnedFile, folder: Path) -> Path:
    """The file below `folder`, downloaded if it is not there. Raises DataError.

    A file there with another sum is an error too: nobody but this program writes it.
    """
    path = folder / pinned.name
    if path.exists():
        check_sum(path, pinned)
        return path
    reasons = []
    for url in pinned.urls:
        print(f"eval: {pinned.name} is not in {folder}: downloading {url}", file=sys.stderr)
        try:
            _download(url, path, pinned)
        except (OSError, HTTPException, DataError) as exc:
            reasons.append(f"{url}: {exc}")
        else:
            return path
    raise DataError(
        f"cannot download {pinned.name}: {'; '.join(reasons)}. If you have the file: --data-dir"
    )


def _download(url: str, path: Path, pinned: PinnedFile) -> None:
    """To the side and moved when its sum is right, so that `path` is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    digest, total = hashlib.sha256(), 0
    try:
        with (
            urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response,
            part.open("wb") as file,
        ):
            while piece := response.read(PIECE_BYTES):
                total += len(piece)
                if total > pinned.max_bytes:
                    raise DataError(f"more than {pinned.max_bytes} bytes came")
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        _compare_sums(url, digest.hexdigest(), pinned.sha256)
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def check_sum(path: Path, pinned: PinnedFile) -> None:
    """Raises DataError if the file is not there, or is another one."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror}") from exc
    _compare_sums(str(path), found, pinned.sha256)


def _compare_sums(what: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise DataError(f"{what} has the sha256 {found}, but the pinned one is {wanted}")


def _check_count(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise DataError(f"{what}: {found} rows, but there must be {wanted}")


def _json_rows(data: bytes, name: str) -> list[dict[str, str]]:
    try:
        return [json.loads(line) for line in data.split(b"\n") if line.strip()]
    except ValueError as exc:
        raise DataError(f"{name} is not JSON Lines: {exc}") from exc


def _sum(index: int, row: dict[str, str]) -> Sum:
    _, _, gold = row["answer"].rpartition("#### ")
    gold = gold.strip().replace(",", "")
    if not re.fullmatch(r"-?[0-9]+", gold):
        raise DataError(f"{GSM8K.name}: row {index + 1} ends without a whole number: {gold!r}")
    return Sum(index, row["question"], row["answer"], gold)


# --- MMLU


def content_digest(subjects: dict[str, list[Choice]]) -> str:
    """SHA-256 over what the rows say, in the order of subjects' names."""
    digest = hashlib.sha256()
    for subject in sorted(subjects):
        for index, choice in enumerate(subjects[subject]):
            row: list[object] = [subject, index, *choice.row()]
            line = json.dumps(row, ensure_ascii=True, separators=(",", ":")) + "\n"
            digest.update(line.encode("ascii"))
    return digest.hexdigest()


def _check_mmlu(path: Path, found: Mmlu) -> None:
    parts = (
        ("test", found.test, MMLU_TEST_ROWS, MMLU_TEST_DIGEST),
        ("dev", found.dev, MMLU_DEV_ROWS, MMLU_DEV_DIGEST),
    )
    for part, subjects, rows, digest in parts:
        if len(subjects) != MMLU_SUBJECTS:
            raise DataError(
                f"{path}: {len(subjects)} subjects in {part}, but there must be {MMLU_SUBJECTS}"
            )
        _check_count(f"{path}: {part}", sum(map(len, subjects.values())), rows)
        if (seen := content_digest(subjects)) != digest:
            print(
                f"eval: warning: {path}: the {part} questions have the content digest {seen}, "
                f"but the copy that was checked has {digest}; results may not compare",
                file=sys.stderr,
            )


def _read_mmlu(path: Path) -> Mmlu:
    """Raises DataError."""
    found: dict[str, dict[str, list[Choice]]] = {"test": {}, "dev": {}}
    for name, data in _csv_files(path):
        if match := MMLU_MEMBER.fullmatch(name):
            found[match[1]][match[2]] = read_choices(match[2], data, f"{path}: {name}")
    return Mmlu(*(dict(sorted(found[part].items())) for part in ("test", "dev")))


def _csv_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names as in the archive of MMLU, and contents."""
    if path.is_dir():
        for file in sorted(path.glob("*/*.csv")):
            yield f"data/{file.parent.name}/{file.name}", file.read_bytes()
        return
    try:
        with tarfile.open(path) as archive:
            yield from _members(archive, path)
    except (tarfile.TarError, OSError, EOFError) as exc:
        raise DataError(f"{path} cannot be read as an archive: {exc}") from exc


def _members(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[str, bytes]]:
    """Plain files only; nothing is ever unpacked to the disk."""
    for number, member in enumerate(archive):
        if number >= MAX_MEMBERS:
            raise DataError(f"{path} has more than {MAX_MEMBERS} members")
        parts = PurePosixPath(member.name.replace("\\", "/")).parts
        if member.name.startswith(("/", "\\")) or ".." in parts:
            raise DataError(f"{path} has a member with the path {member.name!r}")
        if not (member.isreg() and MMLU_MEMBER.fullmatch(member.name)):
            continue
        if member.size > MAX_MEMBER_BYTES:
            raise DataError(f"{path}: {member.name} has {member.size} bytes")
        file = archive.extractfile(member)
        assert file is not None  # it is a plain file
        yield member.name, file.read()


def read_choices(subject: str, data: bytes, where: str) -> list[Choice]:
    """Both shapes: a letter at the end and no header, or a header and a number from 0."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{where} is no CSV in UTF-8: {exc}") from exc
    golds = {letter: letter for letter in LETTERS}
    if rows and rows[0][:1] == ["question"] and rows[0][-1:] == ["answer"]:
        del rows[0]
        golds = {str(number): letter for number, letter in enumerate(LETTERS)}
    return [_choice(subject, n, row, golds, where) for n, row in enumerate(rows)]


def _choice(
    subject: str, index: int, row: Sequence[str], golds: dict[str, str], where: str
) -> Choice:
    fields = [field.strip() for field in row]
    if len(fields) != CHOICES + 2 or fields[-1] not in golds:
        raise DataError(
            f"{where}: row {index + 1} has {len(fields)} fields and ends with {fields[-1:]}; "
            f"it must have {CHOICES + 2} and end with one of {', '.join(golds)}"
        )
    return Choice(subject, index, fields[0], tuple(fields[1:-1]), golds[fields[-1]])
