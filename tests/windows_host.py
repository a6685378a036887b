"""A Windows machine to be used over SSH: a real sshd on loopback in front of Wine.

The sshd is Debian's, with a key and a configuration of its own. Commands reach Wine's cmd.exe
as Windows' sshd hands them over, and end with their session as there; files go through Debian's
sftp-server. schtasks is a double (tests/windows_host.c): Wine's own does nothing.

Run as a program it is what the sshd starts for each session.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.windows_parts import Wine

SSHD, SFTP_SERVER = "/usr/sbin/sshd", "/usr/lib/openssh/sftp-server"
SOURCE = Path(__file__).with_suffix(".c")
NAME = "sam-desktop"
MARK = "SSH_SESSION_MARK"
POLL_S = 0.05
SIGKILL = 9  # mypy knows no name for it on Windows, where none of this runs


class WindowsHost:
    """One host; `home` is the account's folder, and `config` what ssh -F takes."""

    def __init__(self, folder: Path, windows: Wine) -> None:
        self.windows = windows
        self.home = windows.folder / "drive_c" / "users" / "sam"
        self.config = folder / "ssh_config"
        self.tasks = folder / "tasks"
        self._folder = folder
        self._port = _free_port()
        self._sshd: subprocess.Popen[bytes] | None = None
        self._scheduler: subprocess.Popen[bytes] | None = None
        for made in (self.home, self.tasks, folder / "bin"):
            made.mkdir(parents=True)

    def start(self) -> None:
        self._build()
        self._write_files()
        self._start_scheduler()
        self.connect()

    def end(self) -> None:
        self.disconnect()
        if self._scheduler is not None:
            self._scheduler.kill()
            self._scheduler.wait(10)

    def connect(self) -> None:
        """Let SSH in; returns once somebody listens."""
        log = (self._folder / "sshd.log").open("ab")
        with log:
            self._sshd = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(self._folder / "sshd_config")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 30
        while not _is_listening(self._port):
            said = (self._folder / "sshd.log").read_text(errors="replace")
            assert self._sshd.poll() is None, f"sshd ended: {said}"
            assert time.monotonic() < deadline, f"sshd does not listen: {said}"
            time.sleep(POLL_S)

    def disconnect(self) -> None:
        """Break every connection, and let nobody in."""
        if self._sshd is not None:
            sessions = _below(self._sshd.pid)
            self._sshd.kill()
            self._sshd.wait(10)
            for pid in sessions:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, SIGKILL)
        self._sshd = None

    def reboot(self) -> None:
        """Pull the plug, and start it again; what is to run at a start of Windows does."""
        self.disconnect()
        self.windows._end_programs()
        if self._scheduler is not None:
            self._scheduler.wait(30)
        self._start_scheduler("boot")
        self.connect()

    def environment(self) -> dict[str, str]:
        """Of every program on the host."""
        from tests.windows_parts import windows_path

        return self.windows.environment(
            {
                "WINEPATH": windows_path(self._folder / "bin"),
                "SCHTASKS_FOLDER": windows_path(self.tasks),
                "USERNAME": "sam",
                "USERDOMAIN": "DESKTOP",
            }
        )

    def _start_scheduler(self, *words: str) -> None:
        from tests.windows_parts import wine

        self._scheduler = subprocess.Popen(
            [wine(), str(self._folder / "bin" / "schtasks.exe"), "service", *words],
            env=self.environment(),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _build(self) -> None:
        from tests.windows_parts import COMPILER

        for name, option in (("schtasks.exe", "-DSCHTASKS"), ("sshsh.exe", "-DSSHSH")):
            words = [COMPILER, "-O2", "-s", "-Wall", "-municode", "-static", option]
            target = self._folder / "bin" / name
            subprocess.run([*words, "-o", str(target), str(SOURCE)], check=True)

    def _write_files(self) -> None:
        folder = self._folder
        for name in ("host_key", "key"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(words, check=True)
        shutil.copy(folder / "key.pub", folder / "authorized_keys")
        session = folder / "session"
        lines = [f"export {name}='{value}'" for name, value in self.environment().items()]
        lines += [f"cd '{self.home}'", f"exec '{sys.executable}' '{Path(__file__).absolute()}'"]
        session.write_text("\n".join(["#!/bin/sh", *lines]) + f" '{folder}'\n")
        session.chmod(0o755)
        (folder / "sshd_config").write_text(
            f"Port {self._port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nPidFile none\nUsePAM no\n"
            "StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"PermitRootLogin yes\nSubsystem sftp {SFTP_SERVER}\nForceCommand {session}\n"
            "MaxStartups 50\n"
            # The account's own shell starts the session; with this it leaves its .bashrc alone,
            # which may take long, and would be killed with the session, whatever it holds.
            "SetEnv SHLVL=1\n"
        )
        self.config.write_text(
            f"Host {NAME}\n  HostName 127.0.0.1\n  Port {self._port}\n"
            f"  User {getpass.getuser()}\n  IdentityFile {folder}/key\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking accept-new\n"
        )


def why_missing() -> str:
    """What has to be installed; empty if all is there."""
    return "" if Path(SSHD).exists() else "no sshd: apt-get install openssh-server"


@contextlib.contextmanager
def running(folder: Path, windows: Wine) -> Iterator[WindowsHost]:
    """The host, on a Windows that runs; its sshd and all its sessions are ended in any case."""
    if getpass.getuser() == "root":
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd, started by root, wants it
    host = WindowsHost(folder, windows)
    try:
        host.start()
        yield host
    finally:
        host.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _below(pid: int) -> list[int]:
    """Every process that this one started, and what those started."""
    parents: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = file.read_text(errors="replace").rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(file.parent.name))
    found, left = [], [pid]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


# --- one session, started by sshd


def session(folder: Path) -> int:
    """Serve files, or run a command that ends with the session."""
    wanted = os.environ.get("SSH_ORIGINAL_COMMAND", "")
    if SFTP_SERVER in wanted:
        os.execv(SFTP_SERVER, [SFTP_SERVER, "-d", str(Path.cwd())])
    mark, parent = secrets.token_hex(16), os.getppid()
    process = subprocess.Popen(
        ["/usr/lib/wine/wine64", str(folder / "bin" / "sshsh.exe")],
        env=os.environ | {MARK: mark},
    )
    try:
        while process.poll() is None and os.getppid() == parent:
            time.sleep(POLL_S)
    finally:
        _end_marked(mark)
    return process.wait(10)


def _end_marked(mark: str) -> None:
    """As the job object of a session does on Windows, once it is closed."""
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), SIGKILL)


if __name__ == "__main__":
    sys.exit(session(Path(sys.argv[1])))
