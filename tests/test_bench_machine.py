"""What is noted of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import machine
from tests.daemon import ROOT, is_alive, wait_until

GROWS = """
import sys
print("small", flush=True)
sys.stdin.readline()
block = bytearray(b"x" * 200_000_000)
print("large", flush=True)
sys.stdin.readline()
"""


def test_a_process_that_takes_memory_is_seen_to() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", GROWS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "small\n"
        before = machine.rss_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "large\n"
        after = machine.rss_bytes(process.pid)

    assert before is not None
    assert after is not None
    assert 0 < before < 150_000_000
    assert 150_000_000 < after - before < 300_000_000


def test_of_a_process_that_is_gone_nothing_is_known() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(60)
    wait_until(lambda: not is_alive(process.pid), "it is gone")

    assert machine.rss_bytes(process.pid) is None


def test_the_priority_has_a_name() -> None:
    assert machine.priority() in ("normal", "below normal", "idle") or "nice" in machine.priority()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has classes instead")
def test_a_nicer_process_says_how_nice_it_is() -> None:
    ours = subprocess.run(["nice"], capture_output=True, text=True, timeout=60, check=True)
    script = "from bench import machine; print(machine.priority())"
    command = ["nice", "-n", "7", sys.executable, "-c", script]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout == f"nice {int(ours.stdout) + 7}\n"


Smi = Callable[[str], None]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Puts a program of this name first that runs these lines of shell."""
    if sys.platform == "win32":
        pytest.skip("Windows starts no scripts")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def write(lines: str) -> None:
        file = tmp_path / "nvidia-smi"
        file.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n{lines}\n')
        file.chmod(0o755)

    return write


def test_memory_of_all_cards_is_added_up(nvidia_smi: Smi, tmp_path: Path) -> None:
    nvidia_smi("echo 1024\necho 512")

    assert machine.vram_bytes() == 1536 * 2**20
    asked = (tmp_path / "asked").read_text()
    assert asked == "--query-gpu=memory.used --format=csv,noheader,nounits\n"


@pytest.mark.parametrize("lines", ["echo '[N/A]'", "echo 'No devices were found'; exit 6", ":"])
def test_a_card_that_tells_nothing_is_no_card(nvidia_smi: Smi, lines: str) -> None:
    nvidia_smi(lines)

    assert machine.vram_bytes() is None


def test_the_machine_is_described(nvidia_smi: Smi) -> None:
    nvidia_smi("echo 'NVIDIA GeForce RTX 4090'")

    found = machine.described()

    assert found["gpus"] == ["NVIDIA GeForce RTX 4090"]
    assert found["cores"] == os.cpu_count()
    assert found["processor"]
