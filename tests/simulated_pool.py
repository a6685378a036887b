"""The real pool over children that are only simulated: no process, no port, no socket.

Queue, decisions, leases, waiting threads and the threads that load, stop and reap are
pool.py's own. Simulated is what stands beyond them: how long a child loads and stops,
how its load fails, when it dies or is stuck. Time is real, and can be short.

bench/trace_replay.py uses it too, so it needs the standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from pool import (
    Action,
    Lease,
    LoadFailed,
    LoadTimeout,
    Pool,
    PoolConfig,
    Sidecar,
    SidecarError,
    State,
    Ticket,
    _thread,
)
from validator import SidecarSpec

OUT_OF_MEMORY = "cudaMalloc failed: out of memory"
PATIENCE_S = 20.0  # for anything that ends by itself


@dataclasses.dataclass
class Life:
    """What one child does. Seconds."""

    load_s: float = 0.0
    stop_s: float = 0.0
    load_error: str = ""  # its last words: it ends when its load would be done
    times_out: bool = False  # its load ends in LoadTimeout, and the child lives on
    cannot_spawn: bool = False
    load_gate: threading.Event | None = None  # the load is not done before this is set


class SimulatedChild:
    """Stands where the process would; `end` is a death that nobody asked for."""

    pids = itertools.count(1_000_000)

    def __init__(self, life: Life, on_end: Callable[[SimulatedChild], None]) -> None:
        self.pid = next(self.pids)
        self.life = life
        self.is_stuck = False
        self.returncode: int | None = None
        self._on_end = on_end
        self._has_ended = threading.Event()
        self._ending = threading.Lock()  # only one end counts

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._has_ended.wait(timeout):
            raise subprocess.TimeoutExpired("simulated", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def end(self, code: int) -> None:
        with self._ending:
            if self.returncode is None:
                self._on_end(self)
                self.returncode = code
                self._has_ended.set()

    def load(self) -> None:
        """Return once it is loaded, or dead."""
        self._has_ended.wait(self.life.load_s)
        while self.life.load_gate and not self._has_ended.is_set():
            if self.life.load_gate.wait(0.005):
                break


LifeOf = Callable[[SidecarSpec, int], Life]  # of a spec's n-th start, counted from 0


class SimulatedPool(Pool):
    """A pool whose children live as `life_of` says. Notes what must never happen in `faults`.

    What it notes is checked at each decision, with the lock held.
    """

    def __init__(self, config: PoolConfig, life_of: LifeOf) -> None:
        self.faults: list[str] = []
        self.starts: list[str] = []  # hashes, in the order in which processes were started
        self.evictions = 0
        self.threads_inside = 0
        self._life_of = life_of
        self._counting = threading.Lock()  # guards starts, _alive and threads_inside
        self._alive: set[SimulatedChild] = set()
        self._held: dict[Ticket, Sidecar] = {}  # by a count of its own; under _changed
        self._leaving: set[Ticket] = set()  # under _changed
        self._seen: list[Sidecar] = []  # under _changed
        self._drained_for: dict[Sidecar, Ticket] = {}  # under _changed
        self._kept_places = 0  # for loads that ran out of memory; under _changed
        super().__init__(config)

    # --- what a test asks

    def children(self) -> list[SimulatedChild]:
        with self._counting:
            return list(self._alive)

    def child_of(self, spec: SidecarSpec) -> SimulatedChild | None:
        with self._changed:
            sidecar = self._sidecars.get(spec.hash)
            return cast("SimulatedChild | None", sidecar.process) if sidecar else None

    def hashes(self) -> list[str]:
        with self._changed:
            return list(self._sidecars)

    def dead_but_ready(self) -> list[str]:
        """The models whose child has died, of which the pool does not know (yet)."""
        with self._changed:
            ready = [s for s in self._sidecars.values() if s.state is State.READY]
            return [s.spec.model_id for s in ready if s.process and s.process.poll() is not None]

    def faults_at_the_end(self) -> list[str]:
        """After `close`, and after every client is done: what should not be left."""
        deadline = time.monotonic() + PATIENCE_S
        while self.threads_inside and time.monotonic() < deadline:
            time.sleep(0.001)
        with self._changed:
            left = {
                "sidecars": [s.spec.model_id for s in self._sidecars.values()],
                "processes": [child.pid for child in self.children()],
                "threads": self.threads_inside,
                "waiting": len(self._waiting),
                "leases": len(self._held),
                "in flight": [s.in_flight for s in self._seen if s.in_flight],
                "held places": self._held_places,
            }
        return [f"left at the end: {count} {what}" for what, count in left.items() if count]

    # --- what is simulated

    def _spawn(self, sidecar: Sidecar) -> bool:
        with self._counting:
            number = self.starts.count(sidecar.spec.hash)
        life = self._life_of(sidecar.spec, number)
        if life.cannot_spawn:
            raise OSError("simulated: no such file")
        child = SimulatedChild(life, self._note_end)
        process = cast("subprocess.Popen[bytes]", child)
        with sidecar.spawning:
            with self._changed:
                if sidecar.state is not State.STARTING:
                    return False
            sidecar.tail.clear()
            sidecar.output_ended.set()
            self._note_start(sidecar, child)
            with self._changed:
                sidecar.process = process
        _thread(f"reap-{sidecar.spec.hash}", self._reap, sidecar, process)
        return True

    def _await_ready(self, sidecar: Sidecar) -> SidecarError | None:
        child = cast(SimulatedChild, sidecar.process)
        child.load()
        if sidecar.state is not State.STARTING:
            return sidecar.error
        if child.life.load_error:
            sidecar.tail.append(child.life.load_error)
            child.end(1)
        code = child.poll()
        if child.life.times_out and code is None:
            return LoadTimeout("simulated: not ready in time")
        return None if code is None else LoadFailed(f"simulated: ended with exit code {code}")

    def _end_process(self, sidecar: Sidecar) -> None:
        with sidecar.spawning, self._changed:
            child, upstream = cast("SimulatedChild | None", sidecar.process), sidecar.upstream
        upstream.close()
        if child and child.poll() is None:
            time.sleep(child.life.stop_s)
            child.end(0)

    def _what_ails(self, sidecar: Sidecar) -> str:
        child = cast("SimulatedChild | None", sidecar.process)
        return "simulated: it is stuck" if child and child.is_stuck else ""

    # --- what is counted

    def _note_start(self, sidecar: Sidecar, child: SimulatedChild) -> None:
        with self._counting:
            self._alive.add(child)
            self.starts.append(sidecar.spec.hash)
            alive = len(self._alive)
        if alive > self.config.max_sidecars:
            self.faults.append(f"processes: {alive} of {self.config.max_sidecars} are alive")

    def _note_end(self, child: SimulatedChild) -> None:
        with self._counting:
            self._alive.discard(child)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        with self._counting:
            self.threads_inside += 1
        try:
            yield
        except Exception as exc:
            self.faults.append(f"threads: one ended with {exc!r}")
            raise
        finally:
            with self._counting:
                self.threads_inside -= 1

    def _watch_health(self) -> None:
        with self._inside():
            super()._watch_health()

    def _load(self, sidecar: Sidecar) -> None:
        with self._inside():
            super()._load(sidecar)

    def _stop(self, sidecar: Sidecar, why: str) -> None:
        with self._inside():
            super()._stop(sidecar, why)

    def _end_hold(self, to_restart: Sidecar | None) -> None:
        with self._changed:
            self._kept_places -= 1
        super()._end_hold(to_restart)

    def _reap(self, sidecar: Sidecar, process: subprocess.Popen[bytes]) -> None:
        with self._inside():
            super()._reap(sidecar, process)

    # --- what is checked

    def _fault_if(self, is_wrong: object, text: str) -> None:
        if is_wrong:
            self.faults.append(text)

    def _unserved_locked(self) -> list[Ticket]:
        """Those who wait and whom no sidecar will serve as things are, in order of arrival."""
        return [t for t in self._waiting if not t.is_settled and not self._serving_locked(t)]

    def _decide_locked(self) -> list[Action]:
        before = time.monotonic()
        actions = super()._decide_locked()
        now = time.monotonic()
        alive = list(self._sidecars.values())
        unserved = self._unserved_locked()
        drains = [s.spec.model_id for s in alive if s.is_draining]
        self._fault_if(
            drains and not any(now >= ticket.fair_at for ticket in unserved),
            f"drains: {drains} for nobody who waited long",
        )
        self._fault_if(
            any(not t.is_settled and self._could_be_served_locked(t) for t in self._waiting),
            "wake-up: a request waits beside a sidecar that would take it",
        )
        self._fault_if(
            unserved and self._has_room_locked(), "wake-up: a request waits beside a free place"
        )
        for sidecar in alive:
            if not sidecar.is_draining:
                self._drained_for.pop(sidecar, None)
            elif unserved:
                self._drained_for.setdefault(sidecar, unserved[0])
        is_overdue = bool(unserved) and before >= unserved[0].fair_at
        could_yield = any(s.state is State.READY and not s.is_pinned for s in alive)
        yields = drains or any(s.state is State.STOPPING for s in alive)
        self._fault_if(
            is_overdue and could_yield and not yields,
            "fairness: somebody waited long, and no sidecar makes way",
        )
        return actions

    def _could_be_served_locked(self, ticket: Ticket) -> bool:
        sidecar = self._serving_locked(ticket)
        return bool(sidecar and sidecar.takes_work)

    def _start_locked(self, spec: SidecarSpec, kind: str, pinned: bool) -> list[Action]:
        unserved = self._unserved_locked()
        ahead = list(itertools.takewhile(lambda ticket: ticket.spec != spec, unserved))
        self._fault_if(ahead, f"order: {spec.model_id} takes a place before {len(ahead)} others")
        self._fault_if(
            spec.hash in self._sidecars, f"reuse: {spec.model_id} is started beside its like"
        )
        is_kept = len(self._sidecars) + self._kept_places >= self.config.max_sidecars
        self._fault_if(is_kept, f"memory: {spec.model_id} takes a place that is kept for a load")
        actions = super()._start_locked(spec, kind, pinned)
        self._seen.append(self._sidecars[spec.hash])
        return actions

    def _begin_stop_locked(self, sidecar: Sidecar, why: str) -> list[Action]:
        actions = super()._begin_stop_locked(sidecar, why)
        if actions and why.startswith(("room for", "memory for")):
            self.evictions += 1
            self._kept_places += why.startswith("memory for")
            held = len(self._holders_locked(sidecar))
            name = sidecar.spec.model_id
            self._fault_if(held, f"victim: {name} is evicted with {held} leases")
            self._fault_if(sidecar.in_flight, f"victim: {name} has {sidecar.in_flight} in flight")
            self._fault_if(sidecar.is_pinned, f"pinned: {name} is evicted")
        return actions

    def _move_locked(self, sidecar: Sidecar, state: State) -> None:
        super()._move_locked(sidecar, state)
        child = cast("SimulatedChild | None", sidecar.process)
        is_early = state is State.GONE and child and child.poll() is None
        self._fault_if(is_early, f"places: that of {sidecar.spec.model_id} is free too early")

    def _grant_locked(self, ticket: Ticket, sidecar: Sidecar) -> None:
        name = ticket.spec.model_id
        is_like = sidecar.spec == ticket.spec
        is_larger = sidecar.spec.can_serve(ticket.spec) and not ticket.is_exact
        self._fault_if(sidecar.state is not State.READY, f"lease: {name} gets {sidecar.state}")
        self._fault_if(not (is_like or is_larger), f"lease: {name} gets {sidecar.spec.model_id}")
        waits = self._drained_for.get(sidecar) in self._unserved_locked()
        is_dry = sidecar.is_draining or waits
        self._fault_if(is_dry, f"drains: {name} is granted, but is to run dry for another")
        self._fault_if(ticket.is_settled, f"lease: {name} is granted twice, or too late")
        super()._grant_locked(ticket, sidecar)
        self._held[ticket] = sidecar
        if ticket not in self._waiting:
            ticket.is_taken = True  # it never waited, so nobody marks it else

    def lease(
        self,
        spec: SidecarSpec,
        timeout_s: float,
        *,
        pinned: bool = False,
        exact: bool = False,
        on_wait: Callable[[Ticket], None] | None = None,
    ) -> Lease:
        lease = super().lease(spec, timeout_s, pinned=pinned, exact=exact, on_wait=on_wait)
        with self._changed:
            self._fault_if(lease.sidecar.in_flight < 1, f"lease: {spec.model_id} is not counted")
        return lease

    def release(self, lease: Lease) -> None:
        with self._changed:
            taken = (t for t in self._holders_locked(lease.sidecar) if t.is_taken)
            del self._held[next(taken)]  # whose of these it is, is all one
        super().release(lease)
        with self._changed:
            self._fault_if(lease.sidecar.in_flight < 0, "count: in_flight is below zero")

    def _leave_queue(self, ticket: Ticket) -> None:
        with self._changed:
            if not ticket.is_taken:
                self._leaving.add(ticket)  # it may be granted yet, and is given back at once
        super()._leave_queue(ticket)
        with self._changed:
            if ticket in self._leaving:
                self._leaving.remove(ticket)
                self._held.pop(ticket, None)

    def _holders_locked(self, sidecar: Sidecar) -> list[Ticket]:
        held = self._held.items()
        return [ticket for ticket, s in held if s is sidecar and ticket not in self._leaving]


def simulated_config(**changes: Any) -> PoolConfig:
    """What concerns processes and ports has no effect here."""
    config = PoolConfig(
        server_bin=Path("simulated"),
        ports=range(1, 2),
        max_sidecars=1,
        queue_size=64,
        load_silence_s=60.0,
        health_interval_s=60.0,
        private_dir=Path("simulated"),
        step_s=0.0,
    )
    return dataclasses.replace(config, **changes)


def simulated_spec(name: str, context: int = 0, kin: str = "") -> SidecarSpec:
    """Specs of one `kin` are the same model, and differ by their context only."""
    model = kin or name
    flags = ("--ctx-size", str(context)) if context else (f"--{name}",)
    return SidecarSpec(model, Path("simulated"), flags, flags, (), context)
