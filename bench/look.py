"""What a machine is like, as far as a sweep on it depends on that; for bench.doctor.

It runs on that machine, once in the SSH session and once as a scheduled task: what works in
the one need not in the other.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import machine, room
from bench import plan as plans

SERVER_S = 120.0  # the first start of a large program may be examined by a virus scanner
LIST_S = 30.0
LONGEST = 400


def seen(job: Mapping[str, Any], plan: Path, folder: Path) -> dict[str, Any]:
    """Plain values; what could not be found out is None or says why.

    A plan that names a llama-swap configuration is made whole here, where that lies.
    """
    models, fault = _models(plan)
    servers = sorted({model.server for model in models})
    files = sorted({model.model_path for model in models if model.model_path})
    return {
        "time": time.time(),
        "system": platform.platform(),
        "user": os.environ.get("USERNAME") or os.environ.get("USER", ""),
        "is_admin": is_admin(),
        "priority": machine.priority(),
        "gpus": machine.gpus(),
        "vram_bytes": machine.vram_bytes(),
        "free_bytes": shutil.disk_usage(folder).free,
        "plan": fault,
        "servers": {path: _server(path) for path in servers},
        "models": {path: _size(path) for path in files},
        "running": running_servers(),
        "loaded": _loaded(job),
    }


def _models(plan: Path) -> tuple[tuple[plans.Model, ...], str]:
    """What it measures, or why that is not known."""
    if not plan.exists():
        return (), ""
    try:
        return plans.read(plan).models, ""
    except (plans.PlanError, OSError) as exc:
        return (), str(exc)


def _server(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        return {"error": "there is no such file"}
    found: dict[str, Any] = {}
    for name in ("--version", "--list-devices"):
        code, said = _output([path, name], SERVER_S)
        if code != 0:
            return found | {"error": f"{name}: exit code {code}: {said}"}
        found[name.strip("-")] = said
    return found


def _size(path: str) -> int | None:
    try:
        return Path(path).stat().st_size
    except OSError:
        return None


def _loaded(job: Mapping[str, Any]) -> list[str] | str:
    try:
        found = room.loaded(job.get("sidecar", ""), job.get("llama_swap", ""))
    except room.RoomError as exc:
        return str(exc)
    return [f"{one['by']}: {one['model']}" for one in found]


def _output(argv: list[str], timeout_s: float) -> tuple[int | None, str]:
    """Exit code, or None if there is none, and what it said last."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return None, str(exc)
    return done.returncode, done.stdout.decode("utf-8", "replace").strip()[-LONGEST:]


if sys.platform == "win32":

    def is_admin() -> bool:
        """Whether this process has an administrator's rights, unreduced by UAC."""
        return bool(ctypes.windll.shell32.IsUserAnAdmin())

    def running_servers() -> list[int]:
        """Process ids of every llama-server."""
        words = ["tasklist", "/fo", "csv", "/nh", "/fi", "imagename eq llama-server.exe"]
        code, said = _output(words, LIST_S)
        rows = [line.split('","') for line in said.splitlines() if "llama-server" in line]
        return [int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()] * (code == 0)

else:

    def is_admin() -> bool:
        """Whether this process may do everything."""
        return os.geteuid() == 0

    def running_servers() -> list[int]:
        """Process ids of every llama-server."""
        found = []
        for file in Path("/proc").glob("[0-9]*/comm"):
            try:
                name = file.read_text(errors="replace")
            except OSError:
                continue
            if name.startswith("llama-server"):
                found.append(int(file.parent.name))
        return found
