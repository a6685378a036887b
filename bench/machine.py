"""What a benchmark notes of the machine it runs on: memory in use, priority, what it is."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

NVIDIA_SMI = "nvidia-smi"
NVIDIA_SMI_S = 20.0


def described() -> dict[str, Any]:
    """Which machine this is, as far as it decides how fast anything runs."""
    return {
        "node": platform.node(),
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """The names of the graphics cards, by nvidia-smi; none where that is not there."""
    return _nvidia_smi("name") or []


def vram_bytes() -> int | None:
    """Memory in use on all graphics cards, by everybody; None where nobody can tell.

    Blocks for at most about NVIDIA_SMI_S.
    """
    lines = _nvidia_smi("memory.used")
    try:
        return sum(int(line) * 2**20 for line in lines) if lines else None
    except ValueError:  # [N/A]
        return None


def _nvidia_smi(field: str) -> list[str] | None:
    program = shutil.which(NVIDIA_SMI)
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, f"--query-gpu={field}", "--format=csv,noheader,nounits"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NVIDIA_SMI_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [line.strip() for line in done.stdout.splitlines()] if not done.returncode else None


if sys.platform == "win32":
    from ctypes import wintypes

    _QUERY_LIMITED = 0x1000
    _PRIORITIES = {
        0x40: "idle",
        0x4000: "below normal",
        0x20: "normal",
        0x8000: "above normal",
        0x80: "high",
        0x100: "realtime",
    }

    class _MemoryCounters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS, psapi.h."""

        _fields_ = [
            ("cb", wintypes.DWORD),
            ("PageFaultCount", wintypes.DWORD),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("WorkingSetSize", ctypes.c_size_t),
            ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
            ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
            ("PagefileUsage", ctypes.c_size_t),
            ("PeakPagefileUsage", ctypes.c_size_t),
        ]

    def _kernel32() -> ctypes.WinDLL:
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel32.OpenProcess.restype = wintypes.HANDLE
        kernel32.OpenProcess.argtypes = [wintypes.DWORD, wintypes.BOOL, wintypes.DWORD]
        kernel32.CloseHandle.argtypes = [wintypes.HANDLE]
        kernel32.GetCurrentProcess.restype = wintypes.HANDLE
        kernel32.GetPriorityClass.argtypes = [wintypes.HANDLE]
        kernel32.GetPriorityClass.restype = wintypes.DWORD
        kernel32.K32GetProcessMemoryInfo.argtypes = [
            wintypes.HANDLE,
            ctypes.POINTER(_MemoryCounters),
            wintypes.DWORD,
        ]
        return kernel32

    def rss_bytes(pid: int) -> int | None:
        """Physical memory that a process holds, what it maps included; None if it is gone."""
        kernel32 = _kernel32()
        handle = kernel32.OpenProcess(_QUERY_LIMITED, False, pid)
        if not handle:
            return None
        try:
            counters = _MemoryCounters()
            counters.cb = ctypes.sizeof(counters)
            ok = kernel32.K32GetProcessMemoryInfo(handle, ctypes.byref(counters), counters.cb)
            return (int(counters.WorkingSetSize) or None) if ok else None
        finally:
            kernel32.CloseHandle(handle)

    def priority() -> str:
        """The priority class of this process, which its children inherit."""
        kernel32 = _kernel32()
        found = kernel32.GetPriorityClass(kernel32.GetCurrentProcess())
        return _PRIORITIES.get(found, f"unknown ({found:#x})")

    _SHUTTING_DOWN = 0x2000  # SM_SHUTTINGDOWN, winuser.h

    def is_shutting_down() -> bool:
        """Whether the system ends its programs, llama-server perhaps before us."""
        return bool(ctypes.WinDLL("user32").GetSystemMetrics(_SHUTTING_DOWN))

    def _processor() -> str:
        return platform.processor()

else:

    def is_shutting_down() -> bool:
        """Whether the system ends its programs: here it tells us by a signal."""
        return False

    def rss_bytes(pid: int) -> int | None:
        """Physical memory that a process holds, what it maps included; None if it is gone."""
        try:
            lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
        except OSError:
            return None
        kilobytes = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
        return int(kilobytes[0]) * 1024 if kilobytes else None

    def priority() -> str:
        """How nice this process is, which its children inherit."""
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        return f"nice {niceness}" if niceness else "normal"

    def _processor() -> str:
        try:
            lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        except OSError:
            return platform.processor()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor()
