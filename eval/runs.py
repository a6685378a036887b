"""What eval.run and eval.ab do alike: ask again what failed, give up on a server that is
down, and go on with a run only as it began, and at the server where it began.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import journal
from eval.client import Answer, AskError, Client
from eval.options import Asking
from eval.task import ERROR

RETRY_PAUSE_S = 1.0  # and then twice, three times as long
MAX_ERRORS_IN_A_ROW = 5  # then the server is down, and the rest would fail alike
SAME_SERVER = ("build", "model_bytes", "model_mtime")

Record = dict[str, Any]


class ServerDown(Exception):
    """This contestant cannot go on; in words for the user."""


class OtherServer(journal.JournalError):
    """The file holds replies of another llama.cpp, or of another model file."""

    def __init__(self, path: Path, differences: list[str]) -> None:
        shown = ", ".join(differences)
        super().__init__(f"{path} was begun with another server: {shown}. --new-run begins anew")


@dataclasses.dataclass(frozen=True)
class Tried:
    """An answer, or the last error; `attempts` were made for it."""

    answer: Answer | AskError
    attempts: int


def tried(ask: Callable[[], Answer], tries: int, pause: Callable[[float], object]) -> Tried:
    """Ask up to `tries` times; `pause` waits so many seconds, and ends it by saying True.

    Raises AskError where no other question would be answered either.
    """
    for attempt in range(1, tries + 1):
        try:
            return Tried(ask(), attempt)
        except AskError as exc:
            if exc.is_hopeless:
                raise
            is_last = attempt == tries or not exc.is_retryable
            if is_last or pause(RETRY_PAUSE_S * attempt):
                return Tried(exc, attempt)
    raise AssertionError("tries is at least 1")


def errors_in_a_row(before: int, record: Record) -> int:
    """Raises ServerDown once there are so many that the server must be down."""
    errors = before + 1 if record["outcome"] == ERROR else 0
    if errors == MAX_ERRORS_IN_A_ROW:
        raise ServerDown(
            f"{errors} errors in a row, the last: {record['error']}. The same command goes on"
        )
    return errors


@contextlib.contextmanager
def gone_on_with(
    path: Path,
    decides: Record,
    about: Record,
    settings: Asking,
    *,
    is_left: Callable[[Mapping[str, Record]], bool],
    server: Callable[[], Record],
) -> Iterator[journal.Journal]:
    """The file of the run that `decides` says, begun here or gone on with.

    `is_left` says of the records whether somebody is still to be asked; only then does
    `server` make a first request, and describe who answers.

    Raises OtherRun before anybody is asked in vain, OtherServer, and all that `server` and
    journal.opened raise.
    """
    before = _contents(path)
    if not _is_whole(path, before, decides, is_left, is_new_run=settings.is_new_run):
        about = about | {"server": server()}
        _refuse_other_server(path, before, decides, about["server"], settings)
    with journal.opened(
        path, decides, about, is_new_run=settings.is_new_run, is_repair=settings.is_repair
    ) as file:
        yield file


def _contents(path: Path) -> journal.Contents | None:
    """None where nothing can be read: journal.opened makes the file, or says it better."""
    try:
        return journal.read(path)
    except (OSError, journal.JournalError):
        return None


def _is_whole(
    path: Path,
    contents: journal.Contents | None,
    decides: Record,
    is_left: Callable[[Mapping[str, Record]], bool],
    *,
    is_new_run: bool,
) -> bool:
    """Whether the very run is in the file, whole."""
    if contents is None:
        return not is_left({})
    if contents.header["run_key"] != journal.run_key(decides):
        if is_new_run:
            return not is_left({})
        raise journal.OtherRun(path, journal.differences(contents.header["decides"], decides))
    return not contents.broken and not is_left(contents.records)


def _refuse_other_server(
    path: Path, contents: journal.Contents | None, decides: Record, now: Record, settings: Asking
) -> None:
    """Go on with no other llama.cpp or model file than the run began with."""
    if contents is None or contents.header["run_key"] != journal.run_key(decides):
        return
    then = contents.header["about"].get("server") or {}
    changed = [name for name in SAME_SERVER if then.get(name) and then[name] != now[name]]
    if not changed:
        return
    if settings.is_new_run:
        journal.set_aside(path)
        return
    raise OtherServer(path, [f"{name} {then[name]}, now {now[name]}" for name in changed])


# --- the server


def described(client: Client, first: Answer) -> Record:
    """Who answers, by the answer to a first request. Raises AskError."""
    props = client.props()
    rows = [row for row in client.sidecars() if row.get("hash") == first.sidecar]
    row = rows[0] if rows else {}
    model_path = row.get("model_path") or props.get("model_path") or ""
    return {
        "build": props.get("build_info") or first.build,
        "args": row.get("args"),
        "sidecar": first.sidecar,
        "n_ctx": (props.get("default_generation_settings") or {}).get("n_ctx"),
        "slots": props.get("total_slots"),
        "model_path": model_path,
        **_file_facts(model_path),
    }


def _file_facts(model_path: str) -> Record:
    """Size and time of the model file, where the server names one on this machine."""
    path = Path(model_path)  # of no name: this folder, which is no file
    with contextlib.suppress(OSError, ValueError):
        if path.is_file():
            stat = path.stat()
            when = datetime.datetime.fromtimestamp(stat.st_mtime, datetime.UTC)
            return {"model_bytes": stat.st_size, "model_mtime": when.isoformat(timespec="seconds")}
    return {"model_bytes": None, "model_mtime": None}
