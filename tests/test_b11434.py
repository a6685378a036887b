"""A newer llama-server than the wheel's: a Windows build of b11434, run by Wine.

`make test-windows` runs these too; the other targets leave them out. LLAMA_SERVER_EXE
names the program. What is missing fails them, in words.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import real_parts, windows_parts
from tests.daemon import started_daemon
from tests.llama_server import help_of
from tests.test_flags_integration import (
    SHOWN_BY_NEWER,
    Look,
    Servers,
    assert_lifted_is_said,
    own_props,
)
from tests.test_integration import settings, sidecar
from validator import FlagTable

pytestmark = pytest.mark.windows

WINE_FOLDERS = ("/usr/lib/wine", "/usr/bin", "/opt/wine-stable/bin")
WINE_START_S = 100


def wine_program(name: str) -> Path:
    found = [Path(folder, name) for folder in WINE_FOLDERS if Path(folder, name).is_file()]
    if not found:
        pytest.fail(f"{name} is in none of {', '.join(WINE_FOLDERS)}: apt-get install wine64")
    return found[0]


def server_exe() -> Path:
    exe = windows_parts.real_server()
    if exe is None:
        pytest.skip("there is no llama-server.exe: set LLAMA_SERVER_EXE")
    return exe


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A program that is started as llama-server is, and LLAMA_SERVER_BIN names it.

    It takes paths of this system as they are: Wine's drive Z: is its root.
    """
    exe, wine = server_exe(), wine_program("wine64")
    folder = tmp_path_factory.mktemp("wine")
    of_wine = {"WINEPREFIX": str(folder / "prefix"), "WINEDEBUG": "-all", "LC_ALL": "C.UTF-8"}
    script = folder / "llama-server"
    exports = [f"export {name}={shlex.quote(value)}" for name, value in of_wine.items()]
    command = f'exec {shlex.quote(str(wine))} {shlex.quote(str(exe))} "$@"'
    script.write_text("\n".join(["#!/bin/sh", *exports, command, ""]))
    script.chmod(0o755)
    with wine_prefix(wine, os.environ | of_wine), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_SERVER_BIN", str(script))
        yield script


@contextlib.contextmanager
def wine_prefix(wine: Path, environment: dict[str, str]) -> Iterator[None]:
    """A new Windows for these tests alone; what runs in it ends with it."""

    def run(*command: str) -> None:
        subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=WINE_START_S,
        )

    try:
        run(str(wine), "wineboot", "-i")
        run(str(wine), "winecfg", "-v", "win10")
        yield
    finally:
        run(str(wine_program("wineserver")), "-k")
        shutil.rmtree(environment["WINEPREFIX"], ignore_errors=True)  # it takes 700 MB


def spellings_with_arity(help_text: str) -> dict[str, int]:
    """Each spelling that a help text names, with how many values it shows behind it."""
    found: dict[str, int] = {}
    rows = [line for line in help_text.splitlines() if re.match("-{1,2}[A-Za-z]", line)]
    for line in rows:
        head = re.sub(", +", ",", line).partition("  ")[0]
        names, _, hint = head.partition(" ")
        values = re.sub(r"<[^>]*>|\[[^\]]*\]|\{[^}]*\}", "x", hint).split()
        found |= dict.fromkeys(names.split(","), len(values))
    return found


def test_every_spelling_of_its_help_is_built_in_with_the_same_arity(llama_server: Path) -> None:
    help_text = help_of(llama_server, timeout_s=WINE_START_S)
    named = spellings_with_arity(help_text)
    known = FlagTable.built_in().spellings
    assert len(named) > 400
    assert named["--control-vector-layer-range"] == 2
    assert {name: len(known[name].flag.takes) for name in named if name in known} == named
    of_binary = FlagTable.built_in().for_binary(help_text)
    assert {name for name in of_binary.spellings if of_binary.knows(name)} == set(named)


def test_default_base_args_are_translated_and_start(llama_server: Path, tmp_path: Path) -> None:
    chosen = settings(tmp_path, {"tiny": str(real_parts.tiny())})
    with started_daemon(chosen, tmp_path) as daemon:
        status, headers, _ = daemon.chat("tiny", max_tokens=3)
        assert status == 200
        row = sidecar(daemon, headers)
        words = "--ctx-size 32768 --flash-attn on --gpu-layers 999 --load-mode none"
        assert row["args"] == words.split()
        assert own_props(row)["default_generation_settings"]["n_ctx"] == 32768
        assert daemon.stop() == 0


def test_a_models_own_head_drafts(llama_server: Path, tmp_path: Path) -> None:
    chosen = settings(tmp_path, {"headed": str(real_parts.tiny_mtp())}, BASE_ARGS='["-c", "1024"]')
    with started_daemon(chosen, tmp_path) as daemon:
        flags = "--spec-type draft-mtp --spec-draft-n-max 2"
        status, _, answer = daemon.chat("headed", flags, max_tokens=41, temperature=0)
        assert status == 200
        timings = answer["timings"]
        assert (timings["draft_n"], timings["draft_n_accepted"]) == (28, 25)
        assert daemon.stop() == 0


@pytest.mark.parametrize(("flags", "look"), SHOWN_BY_NEWER)
def test_a_flag_of_its_own_says_the_same_on_the_command_line_and_in_the_body(
    llama_server: Path, tmp_path: Path, flags: str, look: Look
) -> None:
    (tmp_path / "private").mkdir()
    with contextlib.ExitStack() as kept:
        servers = Servers(tmp_path, kept)
        assert servers.table.knows(flags.split()[0])
        assert_lifted_is_said(servers, flags, look)
