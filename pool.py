"""The pool of llama-server processes: reuse, start, evict, queue, stop.

Callers state what they want (`lease`, `remove`, `close`); the pool alone
decides what is started and stopped, and in which order.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import errno
import http.client
import itertools
import json
import logging
import math
import re
import secrets
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import winsvc

if TYPE_CHECKING:
    from validator import SidecarSpec

log = logging.getLogger("pool")

STOP_GRACE_S: Final = 5.0  # from terminate to kill; DESIGN: a stop is bounded
LOAD_LIMIT_FACTOR: Final = 10.0  # a load may take this many times the silence allowed
PROBE_PAUSES_S: Final = (0.01, 0.02, 0.05, 0.1)  # then the last one again and again
PROBE_TIMEOUT_S: Final = 5.0
MAX_MISSED_PROBES: Final = 3
MAX_PORT_TRIES: Final = 5
STRANGER_S: Final = 2.0  # a port where somebody else answers for so long is lost
MAX_PAUSE_S: Final = 60.0  # between two tries of a spec that keeps failing
LAST_WORDS_S: Final = 0.5  # a dead child's output ends at once, unless another holds its pipe
MAX_HISTORIES: Final = 1024
LOADS_REMEMBERED: Final = 5
LOAD_GUESS_S: Final = 5.0  # where none is remembered
MAX_SLOTS_BYTES: Final = 1 << 20
SLOT_COUNTERS: Final = (
    "id_task",
    "n_prompt_tokens",
    "n_prompt_tokens_processed",
    "n_prompt_tokens_cache",
    "next_token",
)
SLOTS_PAUSE_S: Final = 1.5  # asked more often, llama-server is slow to see that a client left
TAIL_LINES: Final = 50
LINE_BYTES: Final = 4096
LOGGED_LINES_PER_S: Final = 500
MAX_IDLE_CONNECTIONS: Final = 32
IDLE_CONNECTION_S: Final = 4.0  # llama-server closes after 5
REQUESTS_PER_CONNECTION: Final = 100  # then llama-server closes (cpp-httplib)
CONNECT_TIMEOUT_S: Final = 5.0
UNWATCHED_S: Final = 0.1  # a child is listened to so long with no eye on its client
NOT_ASKED: Final = 0  # in place of a status
OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE})


class SidecarError(Exception):
    """A client must be told: with which status, which stable code, and when to retry."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class LoadFailed(SidecarError):
    status, code = 502, "model_load_failed"


class LoadTimeout(SidecarError):
    status, code = 504, "load_timeout"


class OutOfDescriptors(SidecarError):
    """Connections hold them all: neither the model nor llama-server is to blame."""

    status, code = 503, "too_many_connections"

    @classmethod
    def because(cls, exc: OSError) -> OutOfDescriptors:
        return cls(f"too many open connections: {exc}", retry_after_s=1.0)


class UpstreamFailed(SidecarError):
    status, code = 502, "upstream_failed"


class NotConnected(UpstreamFailed):
    """The child took no connection, so nothing of the request has reached it."""


class QueueFull(SidecarError):
    status, code = 429, "queue_full"


class PoolBusy(SidecarError):
    status, code = 503, "pool_busy"


class PoolClosed(SidecarError):
    status, code = 503, "shutting_down"


class SidecarNotFound(SidecarError):
    status, code = 404, "sidecar_not_found"


class WaitCancelled(Exception):
    """The caller of `lease` left before it was served."""


class State(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"
    GONE = "gone"


MOVES: Final[Mapping[State, frozenset[State]]] = {
    State.STARTING: frozenset({State.READY, State.STOPPING, State.FAILED}),
    State.READY: frozenset({State.STOPPING, State.GONE}),
    State.STOPPING: frozenset({State.GONE}),
    State.FAILED: frozenset({State.GONE}),
    State.GONE: frozenset(),
}


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """How the pool runs its children. Seconds, unless a name says otherwise."""

    server_bin: Path
    ports: range
    max_sidecars: int
    queue_size: int
    load_silence_s: float  # longest wait for a loading child that shows no sign of life
    health_interval_s: float
    private_dir: Path
    fair_wait_s: float = 20.0  # then a busy sidecar takes no new work, so that it can be evicted
    step_s: float = 5.0  # after an answer with tool calls: the agent will be back
    stall_s: float = 300.0  # a request in flight, and nothing moves
    state_dir: Path | None = None  # names the children, for a start after a crash
    own_args: Callable[[], Sequence[str]] = tuple  # what the daemon sets besides the spec


class Connection:
    """One socket to a child, and what is left of its use."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.used = 0
        self.idle_since = 0.0


class Upstream:
    """The way to one child: its port, its key, its open connections."""

    def __init__(self, port: int, api_key: str) -> None:
        self.port = port
        self.api_key = api_key
        self._lock = threading.Lock()  # guards the three fields below; no I/O under it
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self.is_closed = False

    def take(self, *, fresh: bool = False) -> Connection:
        """An open connection, a kept one if there is one and not `fresh`; it does not block.

        Blocks for at most CONNECT_TIMEOUT_S. Raises OSError.
        """
        while not fresh and (kept := self._pop_idle()):
            is_young = time.monotonic() - kept.idle_since < IDLE_CONNECTION_S
            if is_young and not winsvc.wait_readable([kept.sock], 0):
                return kept  # nothing to read: the child has not closed it
            self.drop(kept)
        sock = socket.create_connection(("127.0.0.1", self.port), CONNECT_TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        winsvc.limit_receive(sock, UNWATCHED_S)
        connection = Connection(sock)
        with self._lock:
            if not self.is_closed:
                self._open.add(connection)
                return connection
        sock.close()
        raise ConnectionAbortedError("the sidecar is being stopped")

    def keep(self, connection: Connection) -> None:
        """Give back a connection whose last answer was read to its end."""
        connection.used += 1
        connection.idle_since = time.monotonic()
        with self._lock:
            if (
                not self.is_closed
                and len(self._idle) < MAX_IDLE_CONNECTIONS
                and connection.used < REQUESTS_PER_CONNECTION
            ):
                self._idle.append(connection)
                return
        self.drop(connection)

    def drop(self, connection: Connection) -> None:
        with self._lock:
            self._open.discard(connection)
        connection.sock.close()

    def close(self) -> None:
        """Break every connection: who reads from one sees its end at once."""
        with self._lock:
            self.is_closed = True
            idle, self._idle = self._idle, []
            busy = self._open.difference(idle)
        for connection in idle:
            self.drop(connection)
        for connection in busy:
            try:
                connection.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed by its user in the meantime

    def _pop_idle(self) -> Connection | None:
        with self._lock:
            return self._idle.pop() if self._idle else None


def _use_moment() -> float:
    """A time to compare uses by; time.monotonic() goes on in steps of 16 ms on Windows."""
    return time.perf_counter()


class Sidecar:
    """One llama-server child. Fields below the line change under the pool's lock only."""

    def __init__(self, spec: SidecarSpec, port: int, origin: str, restarts: int, pinned: bool):
        self.spec = spec
        self.origin = origin  # "started" or "evicted": what it took to make room
        self.restarts = restarts
        self.is_pinned = pinned
        self.created_at = time.time()
        self.started = time.monotonic()
        self.output_came = threading.Event()  # set at each line: time to look again
        self.output_ended = threading.Event()  # all of it is in `tail`
        self.spawning = threading.Lock()  # held while a process is being made: none slips away
        self.last_output = self.started
        self.last_progress = self.started  # when an answer, or a slot's counters, moved last
        self.slots = ""  # the counters of GET /slots when last asked
        self.has_lost_port = False
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        # --- guarded by Pool._changed
        self.state = State.STARTING
        self.upstream = Upstream(port, secrets.token_urlsafe(24))
        self.process: subprocess.Popen[bytes] | None = None
        self.in_flight = 0
        self.requests_total = 0
        self.ready_at: float | None = None
        self.last_used_at: float | None = None
        self.last_used = _use_moment()  # the end of the last request
        self.load_s: float | None = None
        self.step_until = 0.0  # monotonic: its agent is thought to be between two steps
        self.is_draining = False  # takes no new lease: somebody waited too long
        self.missed_probes = 0
        self.error: SidecarError | None = None
        self.is_restart_due = False

    @property
    def takes_work(self) -> bool:
        return self.state is State.READY and not self.is_draining

    @property
    def port(self) -> int:
        return self.upstream.port

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    def last_lines(self, count: int = 8) -> str:
        """The end of the child's output, one printable line."""
        return " | ".join(list(self.tail)[-count:]) or "(it printed nothing)"

    def snapshot(self) -> dict[str, object]:
        return {
            "hash": self.spec.hash,
            "model_id": self.spec.model_id,
            "model_path": str(self.spec.model_path),
            "args": list(self.spec.args),
            "state": self.state.value,
            "port": self.port,
            "pid": self.pid,
            "in_flight": self.in_flight,
            "requests_total": self.requests_total,
            "created_at": _iso(self.created_at),
            "ready_at": _iso(self.ready_at),
            "last_used_at": _iso(self.last_used_at),
            "load_seconds": self.load_s and round(self.load_s, 3),
            "restarts": self.restarts,
        }


@dataclasses.dataclass
class History:
    """What is remembered of a spec beyond one process. Guarded by Pool._changed."""

    starts: int = 0
    loads_s: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=LOADS_REMEMBERED)
    )
    failures: int = 0  # in a row
    retry_at: float = 0.0
    error: SidecarError | None = None


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request's place in the queue. Guarded by Pool._changed but for what is final."""

    spec: SidecarSpec
    is_pinned: bool
    arrived: float  # monotonic, as the next
    fair_at: float  # from then on others give way; one number, for who waits and who decides
    is_exact: bool = False  # only a sidecar of this very spec will do
    start_kind: str = "reused"
    sidecar: Sidecar | None = None
    error: SidecarError | None = None
    is_cancelled: bool = False
    is_taken: bool = False  # its lease was handed out, and will be released

    @property
    def is_settled(self) -> bool:
        return bool(self.sidecar or self.error or self.is_cancelled)


class Lease:
    """One request's hold on a READY sidecar, which cannot be a victim meanwhile."""

    def __init__(self, pool: Pool, sidecar: Sidecar, start_kind: str, wait_s: float) -> None:
        self.sidecar = sidecar
        self.upstream = sidecar.upstream
        self.start_kind = start_kind
        self.wait_s = wait_s
        self.ended_in_tool_calls = False
        self._pool = pool

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.release(self)

    def progressed(self) -> None:
        """Note that the answer moves: a sidecar whose answers move is not stuck."""
        self.sidecar.last_progress = time.monotonic()


Action = Callable[[], None]


class Pool:
    """Sidecars by hash, at most `max_sidecars` of them, and those who wait for one."""

    def __init__(self, config: PoolConfig) -> None:
        self.config = config
        # _changed guards every mutable field of the pool, its sidecars and tickets,
        # and is notified whenever one changes. Spawning, probing, stopping and
        # logging happen with it released. Methods named ..._locked expect it held.
        self._changed = threading.Condition(threading.Lock())
        self._sidecars: dict[str, Sidecar] = {}
        self._waiting: list[Ticket] = []  # in order of arrival
        self._histories: collections.OrderedDict[str, History] = collections.OrderedDict()
        self._held_places = 0  # kept free for a load that ran out of memory
        self._next_port = itertools.cycle(config.ports)
        self._roster = winsvc.Roster(config.state_dir) if config.state_dir else None
        self._closed = threading.Event()  # set under the lock; the health thread waits for it
        winsvc.start_thread("health", self._watch_health)

    # --- what callers want

    def lease(
        self,
        spec: SidecarSpec,
        timeout_s: float,
        *,
        pinned: bool = False,
        exact: bool = False,
        on_wait: Callable[[Ticket], None] | None = None,
    ) -> Lease:
        """Hold a READY sidecar for `spec`, starting one if none is up.

        Unless `exact`, one that is alive and differs only by a larger context
        will do. Blocks for at most `timeout_s` seconds, loading the model included. If it
        must wait at all, `on_wait` gets the ticket first, with which `cancel`
        ends the wait; the load itself goes on.

        Raises LoadFailed or LoadTimeout if the child cannot start, PoolBusy after
        `timeout_s`, QueueFull, PoolClosed, or WaitCancelled.
        """
        now = time.monotonic()
        ticket = Ticket(spec, pinned, now, now + self.config.fair_wait_s, exact)
        with self._changed:
            self._check_open_locked()
            sidecar = self._serving_locked(ticket)
            if sidecar and sidecar.takes_work:
                self._grant_locked(ticket, sidecar)
                return Lease(self, sidecar, "reused", 0.0)
            if len(self._waiting) >= self.config.queue_size:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting already, and the queue holds "
                    f"{self.config.queue_size}: try again later",
                    retry_after_s=self._expected_load_locked(spec),
                )
            self._waiting.append(ticket)
            actions = self._decide_locked()
        _run(actions)
        try:
            if on_wait and not ticket.is_settled:
                on_wait(ticket)
            return self._wait(ticket, timeout_s)
        finally:
            self._leave_queue(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """End a wait: its `lease` raises WaitCancelled. Does nothing if it is over."""
        with self._changed:
            if not ticket.is_settled:
                ticket.is_cancelled = True
                self._changed.notify_all()

    def release(self, lease: Lease) -> None:
        sidecar = lease.sidecar
        with self._changed:
            sidecar.in_flight -= 1
            sidecar.last_used = _use_moment()
            sidecar.last_used_at = time.time()
            steps_on = lease.ended_in_tool_calls
            sidecar.step_until = time.monotonic() + self.config.step_s if steps_on else 0.0
            actions = self._decide_locked() if self._waiting else []
            if self.is_closed:
                self._changed.notify_all()  # `close` waits for the last of them
        _run(actions)

    def remove(self, hash_: str) -> None:
        """Stop this sidecar, cutting what is in flight; return once its process is gone.

        Blocks for STOP_GRACE_S and a moment at most. Raises SidecarNotFound.
        """
        with self._changed:
            sidecar = self._sidecars.get(hash_)
            if sidecar is None:
                raise SidecarNotFound(f"no sidecar {hash_!r}: GET /sidecars lists those alive")
            actions = self._begin_stop_locked(sidecar, "it was deleted")
            for ticket in self._waiting:
                if ticket.spec.hash == hash_ and not ticket.is_settled:
                    ticket.error = sidecar.error
            self._changed.notify_all()
        _run(actions)
        with self._changed:
            self._changed.wait_for(lambda: sidecar.state is State.GONE, STOP_GRACE_S + 10)

    def why_gone(self, sidecar: Sidecar, within_s: float) -> str | None:
        """What ended this sidecar, once that is known; blocks for at most `within_s`."""
        with self._changed:
            self._changed.wait_for(lambda: sidecar.error, within_s)
            return sidecar.error.message if sidecar.error else None

    def progress(self, ticket: Ticket) -> str:
        """What a waiting request waits for, in a few words."""
        with self._changed:
            now = time.monotonic()
            sidecar = self._serving_locked(ticket)
            if sidecar and sidecar.state is State.STARTING:
                return f"loading model {now - sidecar.started:.1f}s"
            ahead = self._waiting.index(ticket) if ticket in self._waiting else 0
            return f"waiting for a place, {ahead} ahead {now - ticket.arrived:.1f}s"

    def snapshot(self) -> list[dict[str, object]]:
        """What GET /sidecars shows, most recently used first."""
        with self._changed:
            alive = sorted(self._sidecars.values(), key=lambda s: s.last_used, reverse=True)
            return [sidecar.snapshot() for sidecar in alive]

    def counts(self) -> tuple[collections.Counter[str], int]:
        """Sidecars by state, and how many requests wait."""
        with self._changed:
            states = collections.Counter(s.state.value for s in self._sidecars.values())
            return states, len(self._waiting)

    def ready_models(self) -> set[str]:
        with self._changed:
            alive = self._sidecars.values()
            return {s.spec.model_id for s in alive if s.state is State.READY}

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def close(self, drain_s: float) -> None:
        """Refuse new work, let running requests finish for `drain_s` seconds, end all children.

        Blocks for `drain_s` and STOP_GRACE_S and a moment at most. Calling it
        again, with 0, cuts the first call's wait short.
        """
        with self._changed:
            self._closed.set()
            for ticket in self._waiting:
                ticket.error = _closed_error()
            self._waiting.clear()
            self._changed.notify_all()
            self._changed.wait_for(self._is_idle_locked, drain_s)
            actions = [
                action
                for sidecar in list(self._sidecars.values())
                for action in self._begin_stop_locked(sidecar, "shutdown")
            ]
            self._changed.notify_all()
        _run(actions)
        with self._changed:
            self._changed.wait_for(lambda: not self._sidecars, STOP_GRACE_S + 10)
            has_ended = not self._sidecars
        if self._roster and has_ended:
            self._roster.close()

    # --- decisions, under the lock; what they return happens after it is let go

    def _check_open_locked(self) -> None:
        if self.is_closed:
            raise _closed_error()

    def _is_idle_locked(self) -> bool:
        return not any(s.in_flight for s in self._sidecars.values())

    def _decide_locked(self) -> list[Action]:
        """Serve those who wait, in order of arrival, as far as it can be done now."""
        self._end_drains_locked()
        actions = self._serve_locked()
        if self._end_drains_locked():
            actions += self._serve_locked()  # who waited for a drained one goes on with it
        self._waiting = [t for t in self._waiting if not t.is_settled]
        self._changed.notify_all()
        return actions

    def _serve_locked(self) -> list[Action]:
        """Give each in turn a lease, a start, or a victim whose place it will get."""
        actions: list[Action] = []
        coming = sum(s.state is State.STOPPING for s in self._sidecars.values())
        planned: set[str] = set()
        may_take_place = True
        for ticket in list(self._waiting):
            if ticket.is_settled:
                continue
            hash_ = ticket.spec.hash
            sidecar = self._serving_locked(ticket)
            if sidecar and sidecar.takes_work:
                self._grant_locked(ticket, sidecar)
            elif sidecar and sidecar.state is not State.STOPPING:
                ticket.start_kind = sidecar.origin
            elif sidecar or hash_ in planned or not may_take_place:
                continue  # its turn comes when a process is gone
            elif stored := self._failure_locked(hash_):
                ticket.error = stored
            elif self._has_room_locked():
                actions += self._start_locked(ticket.spec, ticket.start_kind, ticket.is_pinned)
                ticket.start_kind = self._sidecars[hash_].origin
            else:
                planned.add(hash_)
                ticket.start_kind = "evicted"
                if coming:
                    coming -= 1
                elif victim := self._victim_for_locked(ticket):
                    actions += self._begin_stop_locked(victim, f"room for {hash_}")
                else:
                    may_take_place = False
                    self._drain_for_locked(ticket)
        return actions

    def _serving_locked(self, ticket: Ticket) -> Sidecar | None:
        """The sidecar whose turn the ticket waits for, if there is one.

        Its own, or while that is not up one that is alive with a larger context:
        of several one that takes work, else one that loads, then the smallest.
        """
        own = self._sidecars.get(ticket.spec.hash)
        if ticket.is_exact or (own and own.state is not State.STOPPING):
            return own
        larger = (
            s
            for s in self._sidecars.values()
            if s.state in (State.STARTING, State.READY) and s.spec.can_serve(ticket.spec)
        )
        return min(
            larger, key=lambda s: (not s.takes_work, s.is_draining, s.spec.context), default=own
        )

    def _end_drains_locked(self) -> bool:
        """Let drained sidecars take work again once nobody who waited too long needs room.

        Whether there were any.
        """
        draining = [s for s in self._sidecars.values() if s.is_draining]
        if not draining or any(self._is_overdue_locked(ticket) for ticket in self._waiting):
            return False
        for sidecar in draining:
            sidecar.is_draining = False
        return True

    def _is_overdue_locked(self, ticket: Ticket) -> bool:
        """Whether it has waited its fair time, and no sidecar is there for it yet."""
        has_waited = time.monotonic() >= ticket.fair_at
        return has_waited and not ticket.is_settled and not self._serving_locked(ticket)

    def _has_room_locked(self) -> bool:
        return len(self._sidecars) + self._held_places < self.config.max_sidecars

    def _victim_for_locked(self, ticket: Ticket) -> Sidecar | None:
        """Whom to evict for a request now. One between steps is spared for its step's time.

        Not beyond the time that is fair to the request: then it can be a victim too.
        """
        victim = self._victim_locked()
        now = time.monotonic()
        is_spared = victim and victim.step_until > now
        return None if is_spared and now < ticket.fair_at else victim

    def _victim_locked(self) -> Sidecar | None:
        """The least recently used READY sidecar that nobody holds and nobody pinned.

        One whose agent is between two steps comes last.
        """
        now = time.monotonic()
        idle = (
            s
            for s in self._sidecars.values()
            if s.state is State.READY and not s.in_flight and not s.is_pinned
        )
        return min(idle, key=lambda s: (s.step_until > now, s.last_used), default=None)

    def _drain_for_locked(self, ticket: Ticket) -> None:
        """Once a request has waited its fair time, let one busy sidecar run dry for it."""
        if time.monotonic() < ticket.fair_at:
            return
        busy = [
            s
            for s in self._sidecars.values()
            if s.state is State.READY and s.in_flight and not s.is_pinned
        ]
        if busy and not any(s.is_draining for s in busy):
            min(busy, key=lambda s: s.last_used).is_draining = True

    def _grant_locked(self, ticket: Ticket, sidecar: Sidecar) -> None:
        sidecar.in_flight += 1
        sidecar.requests_total += 1
        sidecar.last_progress = time.monotonic()
        ticket.sidecar = sidecar

    def _failure_locked(self, hash_: str) -> SidecarError | None:
        history = self._histories.get(hash_)
        if history is None or history.error is None:
            return None
        left_s = history.retry_at - time.monotonic()
        if left_s <= 0:
            return None
        return type(history.error)(history.error.message, retry_after_s=left_s)

    def _expected_load_locked(self, spec: SidecarSpec) -> float:
        """Seconds, by the loads of this very spec."""
        history = self._histories.get(spec.hash)
        return statistics.median(history.loads_s) if history and history.loads_s else LOAD_GUESS_S

    def _load_words_locked(self, spec: SidecarSpec) -> str:
        history = self._histories.get(spec.hash)
        if not history or not history.loads_s:
            return "it has not been loaded yet"
        return f"of late it took {self._expected_load_locked(spec):.1f} s to load"

    def _history_locked(self, hash_: str) -> History:
        history = self._histories.setdefault(hash_, History())
        self._histories.move_to_end(hash_)
        if len(self._histories) > MAX_HISTORIES:
            self._histories.popitem(last=False)
        return history

    def _start_locked(self, spec: SidecarSpec, kind: str, pinned: bool) -> list[Action]:
        origin = "evicted" if kind == "evicted" else "started"
        history = self._history_locked(spec.hash)
        sidecar = Sidecar(spec, 0, origin, history.starts, pinned)
        history.starts += 1
        self._sidecars[spec.hash] = sidecar
        return [lambda: _thread(f"load-{spec.hash}", self._load, sidecar)]

    def _move_locked(self, sidecar: Sidecar, state: State) -> None:
        if state not in MOVES[sidecar.state]:
            raise AssertionError(f"{sidecar.spec.hash}: {sidecar.state} cannot become {state}")
        sidecar.state = state
        self._changed.notify_all()

    def _begin_stop_locked(self, sidecar: Sidecar, why: str) -> list[Action]:
        if sidecar.state not in (State.STARTING, State.READY):
            return []
        self._move_locked(sidecar, State.STOPPING)
        if sidecar.error is None:
            sidecar.error = UpstreamFailed(f"sidecar {sidecar.spec.hash} was stopped: {why}")
        return [lambda: _thread(f"stop-{sidecar.spec.hash}", self._stop, sidecar, why)]

    # --- waiting

    def _wait(self, ticket: Ticket, timeout_s: float) -> Lease:
        deadline = ticket.arrived + timeout_s
        decided_at = ticket.arrived
        while True:
            with self._changed:
                self._wait_for_chance_locked(ticket, deadline, decided_at)
                if not ticket.is_settled and time.monotonic() >= deadline:
                    ticket.error = self._too_long_locked(ticket, timeout_s)
                if ticket.is_settled:
                    return self._settled_locked(ticket)
                decided_at = time.monotonic()
                actions = self._decide_locked()
            _run(actions)

    def _wait_for_chance_locked(self, ticket: Ticket, deadline: float, decided_at: float) -> None:
        """Return once the ticket is settled, or time alone may have changed what can be decided.

        When that will be can change meanwhile: a release may begin a step's time.
        """
        until = min(deadline, self._next_chance_locked(ticket, decided_at))
        self._changed.wait_for(
            lambda: ticket.is_settled or self._next_chance_locked(ticket, decided_at) < until,
            max(0.0, until - time.monotonic()),
        )

    def _next_chance_locked(self, ticket: Ticket, decided_at: float) -> float:
        """When time alone may change what was decided for the ticket; that may be past by now."""
        times = [ticket.fair_at, *(s.step_until for s in self._sidecars.values())]
        return min((moment for moment in times if moment > decided_at), default=math.inf)

    def _leave_queue(self, ticket: Ticket) -> None:
        """A wait is over, however it ended: take back what nobody will use."""
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            if ticket.sidecar and not ticket.is_taken:
                ticket.sidecar.in_flight -= 1
                self._changed.notify_all()  # `close` may wait for this one
            actions = self._decide_locked() if not ticket.is_taken and not self.is_closed else []
        _run(actions)

    def _settled_locked(self, ticket: Ticket) -> Lease:
        if ticket.sidecar:
            ticket.is_taken = True
            wait_s = time.monotonic() - ticket.arrived
            return Lease(self, ticket.sidecar, ticket.start_kind, wait_s)
        if ticket.error:
            raise ticket.error
        raise WaitCancelled

    def _too_long_locked(self, ticket: Ticket, timeout_s: float) -> SidecarError:
        expected_s = self._expected_load_locked(ticket.spec)
        words = self._load_words_locked(ticket.spec)
        model = ticket.spec.model_id
        sidecar = self._serving_locked(ticket)
        if sidecar and not sidecar.is_draining:
            return LoadTimeout(
                f"{model} is still loading after {timeout_s:g} s ({words}); "
                "the load goes on, ask again",
                retry_after_s=max(1.0, sidecar.started + expected_s - time.monotonic()),
            )
        return PoolBusy(
            f"every one of the {self.config.max_sidecars} sidecars was busy for {timeout_s:g} s, "
            f"so {model} could not be started ({words}): try again, or raise MAX_SIDECARS",
            retry_after_s=expected_s,
        )

    # --- one thread per load

    def _load(self, sidecar: Sidecar) -> None:
        error = self._try_load(sidecar)
        evicted = self._make_memory(sidecar) if _ran_out_of_memory(sidecar, error) else None
        if evicted:
            log.warning(
                "retry hash=%s model=%s: it ran out of memory, %s made room",
                *(sidecar.spec.hash, sidecar.spec.model_id, evicted.spec.hash),
            )
            error = self._try_load(sidecar)
        if error is not None:
            self._record_failure(sidecar, error)
        if evicted:
            self._end_hold(evicted if error else None)

    def _try_load(self, sidecar: Sidecar) -> SidecarError | None:
        """None once it is READY, or once somebody else stops it."""
        error: SidecarError | None = None
        try:
            for _ in range(MAX_PORT_TRIES):
                if not self._spawn(sidecar):
                    break
                error = self._await_ready(sidecar)
                if not (error and _lost_the_port(sidecar)):
                    break
        except SidecarError as exc:
            error = exc
        except OSError as exc:
            error = self._cannot_start(exc)
        if error is None and not self._record_ready(sidecar):
            assert sidecar.process is not None
            error = _exited(sidecar, sidecar.process.wait())
        return error

    def _cannot_start(self, exc: OSError) -> SidecarError:
        if exc.errno in OUT_OF_DESCRIPTORS:
            return OutOfDescriptors.because(exc)
        return LoadFailed(f"{self.config.server_bin} cannot be started: {exc}")

    def _make_memory(self, sidecar: Sidecar) -> Sidecar | None:
        """Evict one idle sidecar for a load that ran out of memory; None if there is none.

        Blocks until its process is gone, at most for STOP_GRACE_S and a moment.
        Its place is kept free until `_end_hold`.
        """
        with self._changed:
            victim = self._victim_locked()
            if sidecar.state is not State.STARTING or victim is None:
                return None
            self._held_places += 1
            actions = self._begin_stop_locked(victim, f"memory for {sidecar.spec.hash}")
        _run(actions)
        with self._changed:
            self._changed.wait_for(lambda: victim.state is State.GONE, STOP_GRACE_S + 10)
        return victim

    def _end_hold(self, to_restart: Sidecar | None) -> None:
        """Free the place that was kept; the evicted one gets it back if it was of no use."""
        with self._changed:
            self._held_places -= 1
            actions = [] if self.is_closed else self._decide_locked()
            if to_restart and not self.is_closed and self._has_room_locked():
                spec = to_restart.spec
                if spec.hash not in self._sidecars:
                    actions += self._start_locked(spec, "started", to_restart.is_pinned)
        _run(actions)

    def _spawn(self, sidecar: Sidecar) -> bool:
        """Start the process on a free port; False if it is no longer wanted."""
        upstream = Upstream(self._free_port(), sidecar.upstream.api_key)
        spec = sidecar.spec
        argv = command_line(self.config.server_bin, spec, upstream.port, self.config.own_args())
        environment = winsvc.child_environment(
            self.config.private_dir, {"LLAMA_API_KEY": upstream.api_key}
        )
        with sidecar.spawning:
            with self._changed:
                if sidecar.state is not State.STARTING:
                    return False
                sidecar.upstream = upstream
            sidecar.tail.clear()
            sidecar.output_ended.clear()
            sidecar.has_lost_port = False
            sidecar.last_output = time.monotonic()
            process = winsvc.spawn(argv, environment)
            with self._changed:
                sidecar.process = process
        if self._roster:
            self._roster.add(process.pid, upstream.port, spec.hash)
        _thread(f"output-{spec.hash}", _drain_output, sidecar, process)
        _thread(f"reap-{spec.hash}", self._reap, sidecar, process)
        log.info(
            "start hash=%s model=%s pid=%d port=%d args=%s",
            *(spec.hash, spec.model_id, process.pid, upstream.port, list(spec.args)),
        )
        return True

    def _free_port(self) -> int:
        for _ in self.config.ports:
            with self._changed:
                port = next(self._next_port)
                taken = any(s.port == port for s in self._sidecars.values())
            if not taken and winsvc.is_port_free(port):
                return port
        raise LoadFailed(
            f"no free port in PORT_RANGE {self.config.ports.start}-{self.config.ports.stop - 1}"
        )

    def _await_ready(self, sidecar: Sidecar) -> SidecarError | None:
        """Wait until the child serves, or say why it never will."""
        process, upstream = sidecar.process, sidecar.upstream
        assert process is not None
        limit = sidecar.started + self.config.load_silence_s * LOAD_LIMIT_FACTOR
        pauses = itertools.chain(PROBE_PAUSES_S, itertools.repeat(PROBE_PAUSES_S[-1]))
        seen, seen_since = "", time.monotonic()
        for pause_s in pauses:
            if sidecar.state is not State.STARTING:
                return sidecar.error
            if process.poll() is not None:
                return _exited(sidecar, process.wait())
            answer = _probe(upstream)
            now = time.monotonic()
            if answer == "ready":
                return None
            if answer != seen:
                seen, seen_since = answer, now
            last_sign = max(seen_since, sidecar.last_output)
            if answer == "stranger" and now - seen_since > STRANGER_S:
                return self._leave_port(sidecar)
            if now - last_sign > self.config.load_silence_s or now > limit:
                return LoadTimeout(
                    f"{sidecar.spec.model_id} was not ready after {now - sidecar.started:.1f} s "
                    f"(last state: {answer}); its last lines: {sidecar.last_lines()}"
                )
            sidecar.output_came.wait(pause_s)
            sidecar.output_came.clear()
        raise AssertionError("unreachable: the pauses never end")

    def _leave_port(self, sidecar: Sidecar) -> LoadFailed:
        """Somebody else answers on the child's port: end the child, to try another port."""
        assert sidecar.process is not None
        sidecar.has_lost_port = True
        winsvc.kill(sidecar.process)
        sidecar.process.wait()
        return LoadFailed(f"another program answers on port {sidecar.port}")

    def _record_ready(self, sidecar: Sidecar) -> bool:
        """Grant it to those who wait; False if it ended just now, where the reaper saw no READY."""
        with self._changed:
            if sidecar.state is not State.STARTING:
                return True
            if sidecar.process is None or sidecar.process.returncode is not None:
                return False
            now = time.monotonic()
            sidecar.ready_at = time.time()
            sidecar.load_s = now - sidecar.started
            sidecar.last_used = _use_moment()
            history = self._history_locked(sidecar.spec.hash)
            history.loads_s.append(sidecar.load_s)
            history.failures, history.error = 0, None
            self._move_locked(sidecar, State.READY)
            actions = self._decide_locked()
        _run(actions)
        log.info(
            "ready hash=%s model=%s pid=%s port=%d load_s=%.3f",
            *(sidecar.spec.hash, sidecar.spec.model_id, sidecar.pid, sidecar.port, sidecar.load_s),
        )
        return True

    def _record_failure(self, sidecar: Sidecar, error: SidecarError) -> None:
        """Tell those who wait, remember the reason, and free the place once it is gone."""
        hash_ = sidecar.spec.hash
        with self._changed:
            if sidecar.state is not State.STARTING:
                return  # it is being stopped, and whoever stops it ends the process
            history = self._history_locked(hash_)
            history.failures += 1
            pause_s = min(MAX_PAUSE_S, 2.0 ** (history.failures - 1))
            history.retry_at = time.monotonic() + pause_s
            history.error = error
            sidecar.error = error
            self._move_locked(sidecar, State.FAILED)
            for ticket in self._waiting:
                if ticket.spec.hash == hash_:
                    ticket.error = error
            self._changed.notify_all()
        log.warning("failed hash=%s model=%s: %s", hash_, sidecar.spec.model_id, error.message)
        self._end_process(sidecar)
        self._forget(sidecar)

    # --- the end of a process

    def _stop(self, sidecar: Sidecar, why: str) -> None:
        self._end_process(sidecar)
        log.info(
            "stop hash=%s model=%s pid=%s port=%d why=%s",
            *(sidecar.spec.hash, sidecar.spec.model_id, sidecar.pid, sidecar.port, why),
        )
        self._forget(sidecar)

    def _end_process(self, sidecar: Sidecar) -> None:
        """Close its connections, terminate it, kill it after STOP_GRACE_S."""
        with sidecar.spawning, self._changed:
            process, upstream = sidecar.process, sidecar.upstream
        upstream.close()
        if process is None:
            return
        winsvc.terminate(process)
        try:
            process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            log.warning("kill hash=%s pid=%d: it ignored terminate", sidecar.spec.hash, process.pid)
            winsvc.kill(process)
            process.wait()

    def _reap(self, sidecar: Sidecar, process: subprocess.Popen[bytes]) -> None:
        """Wait for the process and take note at once, whoever ended it."""
        code = process.wait()
        if self._roster:
            self._roster.remove(process.pid)
        sidecar.output_came.set()
        sidecar.output_ended.wait(LAST_WORDS_S)
        with self._changed:
            if sidecar.state is not State.READY or sidecar.process is not process:
                return
            sidecar.error = UpstreamFailed(
                f"the llama-server of {sidecar.spec.model_id} ended ({_exit_words(code)}); "
                f"its last lines: {sidecar.last_lines()}"
            )
            actions = self._forget_locked(sidecar)
        log.warning("died hash=%s pid=%d: %s", sidecar.spec.hash, process.pid, _exit_words(code))
        sidecar.upstream.close()
        _run(actions)

    def _forget(self, sidecar: Sidecar) -> None:
        with self._changed:
            actions = self._forget_locked(sidecar)
        _run(actions)

    def _forget_locked(self, sidecar: Sidecar) -> list[Action]:
        """Its process is gone: give its place to whoever is next."""
        if sidecar.state is State.GONE:
            return []
        self._move_locked(sidecar, State.GONE)
        if self._sidecars.get(sidecar.spec.hash) is sidecar:
            del self._sidecars[sidecar.spec.hash]
        if self.is_closed:
            return []
        actions = self._decide_locked()
        is_wanted = sidecar.is_restart_due and sidecar.spec.hash not in self._sidecars
        if is_wanted and self._has_room_locked():
            actions += self._start_locked(sidecar.spec, "started", sidecar.is_pinned)
        return actions

    # --- health

    def _watch_health(self) -> None:
        pause_s = min(self.config.health_interval_s, max(SLOTS_PAUSE_S, self.config.stall_s / 4))
        while not self._closed.wait(pause_s):
            with self._changed:
                ready = [s for s in self._sidecars.values() if s.state is State.READY]
            for sidecar in ready:
                _guarded(self._check, sidecar)

    def _check(self, sidecar: Sidecar) -> None:
        reason = self._what_ails(sidecar)
        if reason:
            self._restart(sidecar, reason)

    def _what_ails(self, sidecar: Sidecar) -> str:
        """Why it must be restarted; empty while it is well, or only slow.

        An idle one is asked for its slots: /health is answered by another thread,
        and says ok while the one that computes is stuck for good.
        """
        if sidecar.in_flight:
            sidecar.missed_probes = 0
            return self._why_stuck(sidecar)
        is_silent = _get(sidecar.upstream, "/slots", sidecar.upstream.api_key) is None
        sidecar.missed_probes = sidecar.missed_probes + 1 if is_silent else 0
        return "it does not answer" if sidecar.missed_probes >= MAX_MISSED_PROBES else ""

    def _why_stuck(self, sidecar: Sidecar) -> str:
        """A request is in flight: do its bytes or the counters of the slots move?"""
        silent_s = time.monotonic() - sidecar.last_progress
        if silent_s < min(self.config.stall_s / 4, self.config.health_interval_s):
            return ""
        slots = _slots(sidecar.upstream)
        if slots and slots != sidecar.slots:
            sidecar.slots = slots
            sidecar.last_progress = time.monotonic()
            return ""
        return f"nothing has moved for {silent_s:.0f} s" if silent_s > self.config.stall_s else ""

    def _restart(self, sidecar: Sidecar, why: str) -> None:
        with self._changed:
            was_idle = sidecar.missed_probes > 0
            if sidecar.state is not State.READY or (was_idle and sidecar.in_flight):
                return
            sidecar.is_restart_due = True
            actions = self._begin_stop_locked(sidecar, why)
        _run(actions)


def command_line(
    server_bin: Path, spec: SidecarSpec, port: int, own_args: Sequence[str]
) -> list[str]:
    """What is run for a spec; the key goes by the environment."""
    alias = spec.model_id.replace(",", "_")  # a comma would begin a second one
    own = ["--host", "127.0.0.1", "--port", str(port), *own_args]
    return [str(server_bin), "-m", str(spec.model_path), "--alias", alias, *own, *spec.args]


def _run(actions: Iterable[Action]) -> None:
    for action in actions:
        action()


def _thread(name: str, target: Callable[..., None], *args: object) -> None:
    winsvc.start_thread(name, _guarded, target, *args)


def _guarded(target: Callable[..., None], *args: object) -> None:
    try:
        target(*args)
    except Exception:
        log.exception("a thread of the pool failed")


def _closed_error() -> PoolClosed:
    return PoolClosed("the daemon is shutting down: try again soon", retry_after_s=5.0)


def _drain_output(sidecar: Sidecar, process: subprocess.Popen[bytes]) -> None:
    """Read the child's output for ever: a full pipe would hang it."""
    logged = _LoggedLines(sidecar)
    for raw in winsvc.output_lines(process, LINE_BYTES):
        line = printable(raw.decode("utf-8", "replace").rstrip("\r"))
        sidecar.tail.append(line)
        sidecar.last_output = time.monotonic()
        sidecar.output_came.set()
        logged.add(line)
    logged.end_second()
    sidecar.output_ended.set()


class _LoggedLines:
    """A child's lines in the log, so many a second: a flood must not keep us from our work."""

    def __init__(self, sidecar: Sidecar) -> None:
        self._sidecar = sidecar
        self._second = 0.0
        self._count = 0

    def add(self, line: str) -> None:
        now = time.monotonic()
        if now - self._second >= 1.0:
            self.end_second()
            self._second = now
        self._count += 1
        if self._count <= LOGGED_LINES_PER_S:
            self._log(line)

    def end_second(self) -> None:
        left_out = self._count - LOGGED_LINES_PER_S
        self._count = 0
        if left_out > 0:
            self._log(f"({left_out} more lines)")

    def _log(self, line: str) -> None:
        level = logging.INFO if self._sidecar.state is State.STARTING else logging.DEBUG
        log.log(level, "[%s] %s", self._sidecar.spec.hash, line)


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with every control character written out, so that one line stays one."""
    return _UNPRINTABLE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _exited(sidecar: Sidecar, code: int) -> LoadFailed:
    sidecar.output_ended.wait(LAST_WORDS_S)
    return LoadFailed(
        f"llama-server ended while loading {sidecar.spec.model_id} ({_exit_words(code)}); "
        f"its last lines: {sidecar.last_lines()}"
    )


def _exit_words(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _lost_the_port(sidecar: Sidecar) -> bool:
    return sidecar.has_lost_port or any("couldn't bind" in line for line in sidecar.tail)


_OUT_OF_MEMORY = re.compile(
    "out of memory|out of device memory|OutOfDeviceMemory|OutOfHostMemory|cudaMalloc failed"
    "|failed to allocate|unable to allocate|not enough memory|bad_alloc",
    re.IGNORECASE,
)


def _ran_out_of_memory(sidecar: Sidecar, error: SidecarError | None) -> bool:
    """Whether its process ended, and its last lines say that this is why."""
    if not isinstance(error, LoadFailed):
        return False
    return any(_OUT_OF_MEMORY.search(line) for line in list(sidecar.tail))


def _probe(upstream: Upstream) -> str:
    """One word on a loading child: ready, loading, silent, or stranger.

    Anybody may answer 200 on a port. Ours is who refuses a wrong key and takes
    the right one, which only our child was given.
    """
    status = _health(upstream)
    if status is None:
        return "silent"
    if status == 503:
        return "loading"
    if status != 200:
        return f"status {status}"
    is_ours = _get(upstream, "/props", secrets.token_urlsafe(24)) == 401
    return "ready" if is_ours and _get(upstream, "/props", upstream.api_key) == 200 else "stranger"


def _health(upstream: Upstream) -> int | None:
    return _get(upstream, "/health", None)


def _slots(upstream: Upstream) -> str:
    """What its slots have done so far, as text that changes when they move; empty: no answer."""
    status, body = _exchange(upstream, "/slots", upstream.api_key)
    if status != 200:
        return ""
    try:
        rows = [[slot.get(name) for name in SLOT_COUNTERS] for slot in json.loads(body)]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return ""
    return json.dumps(rows)


def _get(upstream: Upstream, path: str, key: str | None) -> int | None:
    """The status of a GET, None if there is no answer within PROBE_TIMEOUT_S.

    NOT_ASKED if it is the daemon that could not ask, which is no fault of the child.
    """
    return _exchange(upstream, path, key)[0]


def _exchange(upstream: Upstream, path: str, key: str | None) -> tuple[int | None, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", upstream.port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        return response.status, response.read(MAX_SLOTS_BYTES)
    except (OSError, http.client.HTTPException) as exc:
        return NOT_ASKED if getattr(exc, "errno", 0) in OUT_OF_DESCRIPTORS else None, b""
    finally:
        connection.close()


def _iso(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
