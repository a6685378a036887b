"""How far a long job is: a bar on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

BAR_CHARS = 20
LINE_EVERY_S = 10.0  # where lines stay, as in a log
ETA_AFTER = 3  # things done: fewer say little about the rest


class Progress:
    """Counts things done of `total`; `done` of them were done by an earlier run.

    `report` may be called as often as one likes; it writes seldom where lines stay. With
    `is_json` each call is one JSON object on a line. Close it, or use it as a context.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int = 0,
        *,
        is_json: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self._title = title
        self._total = total
        self._done = self._before = done
        self._is_json = is_json
        self._stream = stream or (sys.stdout if is_json else sys.stderr)
        self._is_bar = not is_json and self._stream.isatty()
        self._begun = time.monotonic()
        self._shown_at = -LINE_EVERY_S
        self._line = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    @property
    def eta_s(self) -> float | None:
        """Seconds until the end by the pace of this run; None while that says little."""
        here = self._done - self._before
        if here < min(ETA_AFTER, self._total - self._before) or not here:
            return None
        return (time.monotonic() - self._begun) / here * (self._total - self._done)

    def report(self, done: int, said: str = "", **more: Any) -> None:
        """`said` stands at the end of the line; `more` are further fields of the JSON."""
        self._done = done
        said = said if self._is_json else _on_one_line(said)
        if self._is_json:
            self._write_json(said, more)
            return
        parts = [f"{self._title} {done}/{self._total}", said, self._eta_text()]
        self._line = "  ".join(part for part in parts if part)
        if self._is_bar:
            self._write_bar()
        elif time.monotonic() >= self._shown_at + LINE_EVERY_S or done == self._total:
            self._shown_at = time.monotonic()
            self._write(self._line + "\n")

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self._is_json:
            self._write_json(line, {})
        elif self._is_bar:
            self._write(f"\r\x1b[K{_on_one_line(line)}\n")
            self._write_bar()
        else:
            self._write(_on_one_line(line) + "\n")

    def close(self) -> None:
        """Leave the last state on the screen and the cursor below it."""
        if self._is_bar and self._line:
            self._write("\n")
            self._line = ""

    def _eta_text(self) -> str:
        eta_s = self.eta_s
        return "" if eta_s is None or self._done >= self._total else f"ETA {duration(eta_s)}"

    def _write_bar(self) -> None:
        if not self._line:
            return
        full = BAR_CHARS * self._done // max(1, self._total)
        bar = "[" + "#" * full + "." * (BAR_CHARS - full) + "] "
        width = shutil.get_terminal_size().columns - 1
        self._write("\r\x1b[K" + (bar + self._line)[:width])

    def _write_json(self, said: str, more: Mapping[str, Any]) -> None:
        eta_s = self.eta_s
        state = {
            "job": self._title,
            "done": self._done,
            "total": self._total,
            "eta_s": None if eta_s is None else round(eta_s, 1),
            "said": said,
        }
        self._write(json.dumps(state | dict(more)) + "\n")

    def _write(self, text: str) -> None:
        """The job goes on if nobody reads any more."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except OSError:
            _discard(self._stream)


def _discard(stream: TextIO) -> None:
    """From now on, and when the program ends too, what it is given is gone."""
    with contextlib.suppress(OSError, AttributeError):  # it may be no file at all
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _on_one_line(text: str) -> str:
    """Without what would move the cursor: names and errors come from elsewhere."""
    return "".join(char if char.isprintable() else " " for char in text)


def duration(seconds: float) -> str:
    """2 h 05 min, 7 min 30 s, 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole} s"
