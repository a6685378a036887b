"""Many threads on one pool: what must hold at every moment, and what must be left at the end."""

from __future__ import annotations

import http.client
import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import pool
import winsvc
from pool import Pool, PoolConfig, Sidecar, SidecarError, State
from tests.daemon import CHAT, FAKE_SERVER, free_port_range, is_alive, wait_until
from validator import SidecarSpec

THREADS = 24
LIMIT = 2
SECONDS = 5.0
SWITCHES: list[dict[str, object]] = [
    {},
    {"load_seconds": 0.1},
    {"prefill_seconds": 0.02},
    {"bind_error": 1},
    {"exit_after_requests": 40},
    {"exit_first_loads": 1},
]


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Watched(Pool):
    """A pool that notes each decision to stop a sidecar that somebody holds."""

    def __init__(self, config: PoolConfig) -> None:
        self.faults: list[str] = []
        super().__init__(config)

    def _begin_stop_locked(self, sidecar: Sidecar, why: str) -> list[pool.Action]:
        if why.startswith("room for") and sidecar.in_flight:
            self.faults.append(f"{sidecar.spec.model_id} has {sidecar.in_flight} leases")
        return super()._begin_stop_locked(sidecar, why)


def descriptors() -> set[str]:
    """Those of this process; Windows does not tell."""
    if sys.platform == "win32":
        return set()
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except OSError:
            continue  # the listing's own
    return found


def pool_threads(before: set[threading.Thread]) -> list[str]:
    others = set(threading.enumerate()) - before
    return [thread.name for thread in others if not thread.name.startswith("spawner")]


def alias_asked_of(lease: pool.Lease) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", lease.upstream.port, timeout=20)
    try:
        headers = {"Authorization": f"Bearer {lease.upstream.api_key}"}
        connection.request("POST", CHAT, b'{"max_tokens": 1}', headers)
        response = connection.getresponse()
        assert response.status == 200
        return str(json.loads(response.read())["echo"]["model"])
    finally:
        connection.close()


def children_alive(folder: Path) -> list[int]:
    pids = []
    for file in folder.glob("*.starts"):
        lines = file.read_text().splitlines()
        pids += [json.loads(line)["pid"] for line in lines if line.endswith("}")]
    return [pid for pid in pids if is_alive(pid)]


@pytest.mark.usefixtures("frequent_switches")
def test_many_threads_never_break_the_limit_or_a_lease_and_leave_nothing(tmp_path: Path) -> None:
    specs = []
    for number, switches in enumerate(SWITCHES):
        file = tmp_path / f"m{number}.json"
        file.write_text(json.dumps(switches))
        specs.append(SidecarSpec(f"m{number}", file, (), ()))
    first, last = map(int, free_port_range(40).split("-"))
    private = tmp_path / "private"
    private.mkdir()
    start_the_spawner(tmp_path)
    threads_before, descriptors_before = set(threading.enumerate()), descriptors()
    watched = Watched(
        PoolConfig(
            server_bin=FAKE_SERVER,
            ports=range(first, last + 1),
            max_sidecars=LIMIT,
            queue_size=THREADS,
            load_silence_s=20.0,
            health_interval_s=0.05,
            private_dir=private,
            fair_wait_s=0.1,
        )
    )
    faults = watched.faults
    served: list[str] = []
    end = time.monotonic() + SECONDS

    def ask(seed: int) -> None:
        chosen = random.Random(seed)
        while time.monotonic() < end:
            spec = chosen.choice(specs)
            try:
                with watched.lease(spec, 30.0) as lease:
                    if lease.sidecar.spec != spec or lease.sidecar.in_flight < 1:
                        faults.append(f"{spec.model_id}: got {lease.sidecar.snapshot()}")
                    said = alias_asked_of(lease)
                    if said != spec.model_id:
                        faults.append(f"{spec.model_id}: {said} answered")
                    served.append(said)
            except SidecarError as exc:
                if spec.model_id not in ("m4", "m5"):
                    faults.append(f"{spec.model_id}: {exc.message}")
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as exc:
                if spec.model_id != "m4":  # it ends in the middle of others' requests
                    faults.append(f"{spec.model_id}: {exc!r}")

    def watch() -> None:
        while time.monotonic() < end:
            if len(alive := children_alive(tmp_path)) > LIMIT:
                faults.append(f"{len(alive)} children are alive")
            if len(watched.snapshot()) > LIMIT:
                faults.append("more sidecars than there may be")

    try:
        with ThreadPoolExecutor(THREADS + 1) as executor:
            watching = executor.submit(watch)
            for future in [executor.submit(ask, seed) for seed in range(THREADS)]:
                future.result(60)
            watching.result(10)
        states, waiting = watched.counts()
        assert waiting == 0
        assert set(states) <= {state.value for state in State}
        assert all(row["in_flight"] == 0 for row in watched.snapshot())
    finally:
        watched.close(0)
    assert faults == []
    assert set(served) >= {"m0", "m1", "m2", "m3"}, "the run was too short to say anything"
    wait_until(lambda: not pool_threads(threads_before), "every thread has ended", 10)
    assert children_alive(tmp_path) == []
    assert list(private.iterdir()) == []
    wait_until(lambda: descriptors() <= descriptors_before, "every descriptor is closed", 5)


def start_the_spawner(folder: Path) -> None:
    """One start and end before anything is counted: the spawner thread stays for good."""
    process = winsvc.spawn([sys.executable, "-c", ""], {"HOME": str(folder)})
    assert list(winsvc.output_lines(process, 100)) == []
    assert process.wait(10) == os.EX_OK
