"""A Windows machine over SSH: lines that cmd.exe and PowerShell both understand, and files.

Every call ends by itself: ssh gets no input (-n), asks nothing (BatchMode), and has a time
limit of its own and one around it. Exit code 255 is ssh's own; a command's never is. Paths on
the host are relative to the home folder of the account, in ASCII without blanks, so that no
shell has anything to quote and the account may have any name.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

CONNECT_S = 15
ALIVE_S, ALIVE_COUNT = 15, 4
RUN_S = 120.0
COPY_S = 900.0
OWN_EXIT_CODE = 255
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": str(CONNECT_S),
    "ConnectionAttempts": "1",
    "ServerAliveInterval": str(ALIVE_S),
    "ServerAliveCountMax": str(ALIVE_COUNT),
    "ControlMaster": "no",
    "ClearAllForwardings": "yes",
    "LogLevel": "ERROR",
}

# What a word may hold that neither shell reads as anything but itself.
PLAIN = re.compile(r"[A-Za-z0-9_.:/\\=-]+")
PLAIN_PATH = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


class Unreachable(Exception):
    """No connection, or it broke: what was asked may or may not have been done."""


class HostError(Exception):
    """The host is not as it has to be, or refused; in words."""


class Host:
    """One account on one machine; `config` is an ssh_config file in place of the user's."""

    def __init__(self, name: str, config: Path | None = None) -> None:
        if name.startswith("-") or not name:
            raise HostError(f"{name!r} is no host")
        self.name = name
        self._options = [word for k, v in OPTIONS.items() for word in ("-o", f"{k}={v}")]
        if config is not None:
            self._options += ["-F", str(config)]

    def run(self, *words: str, timeout_s: float = RUN_S) -> subprocess.CompletedProcess[bytes]:
        """A program and its arguments. Raises Unreachable, or ValueError for words that a
        shell would read otherwise."""
        wrong = [word for word in words if not PLAIN.fullmatch(word)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} means something else to a shell")
        return self._run_line(" ".join(words), timeout_s)

    def checked(self, *words: str, timeout_s: float = RUN_S) -> str:
        """What it says. Raises Unreachable, or HostError if it fails."""
        done = self.run(*words, timeout_s=timeout_s)
        if done.returncode:
            raise HostError(f"{' '.join(words)}: {said_by(done)} (exit code {done.returncode})")
        return decoded(done.stdout)

    def shell(self) -> str:
        """ "cmd" or "powershell". Raises Unreachable, or HostError if it is neither."""
        said = decoded(self._run_line("echo %OS%", RUN_S).stdout).strip()
        if said == "Windows_NT":
            return "cmd"
        if said == "%OS%":
            system = decoded(self._run_line("echo $env:OS", RUN_S).stdout).strip()
            if system == "Windows_NT":
                return "powershell"
        raise HostError(f"{self.name} is no Windows with cmd.exe or PowerShell: it says {said!r}")

    def _run_line(self, line: str, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        return self._done(["ssh", "-n", "-T", *self._options, self.name, "--", line], timeout_s)

    def put(self, files: Sequence[tuple[Path, str]], timeout_s: float = COPY_S) -> None:
        """Copy files to paths on the host; folders of theirs are made. Raises Unreachable or
        HostError."""
        folders = {str(above) for _, path in files for above in PurePosixPath(path).parents}
        lines = [f"-mkdir {_plain(folder)}" for folder in sorted(folders - {"."})]
        lines += [f"put {_quoted(file)} {_plain(path)}" for file, path in files]
        self._sftp(lines, timeout_s)

    def get(self, paths: Sequence[tuple[str, Path]], timeout_s: float = COPY_S) -> None:
        """Copy those files that there are; one that is not there leaves none here.

        Raises Unreachable or HostError.
        """
        for _, file in paths:
            file.unlink(missing_ok=True)
        self._sftp([f"-get {_plain(path)} {_quoted(file)}" for path, file in paths], timeout_s)

    def get_more(self, path: str, file: Path, also: Sequence[tuple[str, Path]] = ()) -> None:
        """Append to `file` what the host's has beyond its length, and get others as `get`.

        Raises Unreachable or HostError.
        """
        for _, other in also:
            other.unlink(missing_ok=True)
        lines = [f"-get {_plain(other)} {_quoted(here)}" for other, here in also]
        is_begun = file.exists() and file.stat().st_size > 0
        lines += [f"-{'reget' if is_begun else 'get'} {_plain(path)} {_quoted(file)}"]
        self._sftp(lines, COPY_S)

    def remove(self, *paths: str) -> None:
        """Delete files, if they are there. Raises Unreachable or HostError."""
        self._sftp([f"-rm {_plain(path)}" for path in paths], RUN_S)

    def _sftp(self, lines: Sequence[str], timeout_s: float) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".sftp", encoding="utf-8") as batch:
            batch.write("\n".join(lines) + "\n")
            batch.flush()
            done = self._done(["sftp", *self._options, "-b", batch.name, self.name], timeout_s)
        if done.returncode:
            raise HostError(f"sftp to {self.name}: {said_by(done)}")

    def _done(self, argv: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=False,
                start_new_session=True,  # Ctrl-C is for us alone
            )
        except subprocess.TimeoutExpired:
            raise Unreachable(f"{self.name} has not answered within {timeout_s:g} s") from None
        except OSError as exc:
            raise HostError(f"{argv[0]} cannot be run: {exc}") from exc
        if done.returncode == OWN_EXIT_CODE or done.returncode < 0:
            raise Unreachable(said_by(done) or f"the connection to {self.name} broke")
        return done


def decoded(data: bytes) -> str:
    return data.decode("utf-8", "replace").replace("\r\n", "\n")


def said_by(done: subprocess.CompletedProcess[bytes]) -> str:
    """Its last lines, on one."""
    words = decoded(done.stderr).strip() or decoded(done.stdout).strip()
    return " ".join(words.split())[-400:]


def _plain(path: str) -> str:
    if not PLAIN_PATH.fullmatch(path) or ".." in path:
        raise ValueError(f"{path!r} is no plain path below the home folder")
    return path


def _quoted(file: Path) -> str:
    """As sftp's batch wants a path of this machine."""
    text = str(file.absolute())
    if '"' in text or "\n" in text or "\\" in text:
        raise ValueError(f"{text!r} is a name that sftp cannot be told")
    return '"' + text.replace("*", "\\*").replace("?", "\\?").replace("[", "\\[") + '"'
