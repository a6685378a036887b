"""The pool's decisions over simulated children: many random schedules, and named ones.

What must hold at each decision is in tests/simulated_pool.py. A schedule that fails
prints its seed; `SCHEDULE_SEED=N make test ARGS="-k random"` plays that one many times.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

import pool
from bench import trace_replay
from pool import (
    LoadFailed,
    LoadTimeout,
    PoolBusy,
    PoolClosed,
    QueueFull,
    Sidecar,
    SidecarError,
    SidecarNotFound,
    State,
    Ticket,
    UpstreamFailed,
    WaitCancelled,
)
from tests.daemon import wait_until
from tests.simulated_pool import (
    OUT_OF_MEMORY,
    PATIENCE_S,
    Life,
    SimulatedPool,
    simulated_config,
    simulated_spec,
)
from validator import SidecarSpec

SCHEDULES = 500 if sys.platform == "win32" else 2000  # a minute and more of Wine
AT_ONCE = 8
MS = 0.001


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spec whose load failed is tried again soon: schedules last milliseconds."""
    monkeypatch.setattr(pool, "MAX_PAUSE_S", 5 * MS)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of failed loads are noted by the pool's log: that takes longer than they do."""
    caplog.set_level(logging.ERROR, "pool")


# --- random schedules


@dataclasses.dataclass(frozen=True)
class Request:
    """One thing that a client does, then thinks. Seconds."""

    spec: SidecarSpec
    think_s: float
    hold_s: float
    timeout_s: float
    cancel_after_s: float | None
    is_exact: bool
    calls_tools: bool
    leaves_on_wait: bool  # after `hold_s` of it


class Schedule:
    """All that chance decides, drawn from one seed before anything runs."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        chance = random.Random(seed)
        self.chance = chance
        self.places = chance.randint(1, 3)
        names = [f"m{number}" for number in range(chance.randint(1, 3))]
        contexts = chance.sample([1024, 2048, 4096], chance.randint(1, 2))
        self.specs = [simulated_spec(name) for name in names]
        self.specs += [simulated_spec(f"kin{size}", size, "kin") for size in contexts]
        pins = chance.choice([0, 0, 1]) if self.places > 1 else 0
        self.pinned = {spec.hash for spec in chance.sample(self.specs, pins)}
        self.config = simulated_config(
            max_sidecars=self.places,
            queue_size=chance.choice([2, 64, 64, 64]),
            fair_wait_s=chance.choice([0.0, 4 * MS, 12 * MS, 60.0]),
            step_s=chance.choice([0.0, 5 * MS, 15 * MS]),
            health_interval_s=chance.choice([2 * MS, 60.0, 60.0]),
        )
        self.trouble = chance.choice([0.0, 0.0, 0.1, 0.3])  # how many loads fail
        self.disturbances = [
            (chance.uniform(0, 8 * MS), chance.choice(["die", "die", "delete", "stick"]))
            for _ in range(chance.choice([0, 0, 2, 5]))
        ]
        self.closes_after_s = chance.choice([None, None, None, chance.uniform(0, 20 * MS)])
        self.drain_s = chance.choice([0.0, 2 * MS, 1.0])
        self.clients = [
            [self.request() for _ in range(chance.randint(1, 4))]
            for _ in range(chance.randint(2, 8))
        ]

    def request(self) -> Request:
        chance = self.chance
        is_hasty = chance.random() < 0.15
        return Request(
            spec=chance.choice(self.specs),
            think_s=chance.choice([0.0, 0.0, chance.uniform(0, 4 * MS)]),
            hold_s=chance.choice([0.0, chance.uniform(0, 4 * MS)]),
            timeout_s=chance.uniform(0, 8 * MS) if is_hasty else PATIENCE_S,
            cancel_after_s=chance.uniform(0, 5 * MS) if chance.random() < 0.15 else None,
            is_exact=chance.random() < 0.3,
            calls_tools=chance.random() < 0.4,
            leaves_on_wait=chance.random() < 0.05,
        )

    def life_of(self, spec: SidecarSpec, number: int) -> Life:
        chance = random.Random(f"{self.seed} {spec.hash} {number}")
        life = Life(load_s=chance.uniform(0, 4 * MS), stop_s=chance.choice([0.0, 2 * MS]))
        if chance.random() < self.trouble:
            life.load_error = chance.choice([OUT_OF_MEMORY, OUT_OF_MEMORY, "no such tensor"])
            life.cannot_spawn = chance.random() < 0.1
            if chance.random() < 0.2:
                life.times_out, life.load_error = True, ""
        return life


class LeftOnWait(Exception):
    """What `on_wait` raises where the client turns out to be gone."""


class Run:
    """One schedule, played once. `faults` is what went wrong."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.pool = SimulatedPool(schedule.config, schedule.life_of)
        self.faults = self.pool.faults
        self.ends: collections.Counter[str] = collections.Counter()
        self.closing = threading.Event()

    def play(self) -> list[str]:
        schedule = self.schedule
        threads = [threading.Thread(target=self.client, args=(c,)) for c in schedule.clients]
        threads.append(threading.Thread(target=self.disturb))
        for thread in threads:
            thread.daemon = True
            thread.start()
        deadline = time.monotonic() + 2 * PATIENCE_S
        if schedule.closes_after_s is not None:
            self.closing.wait(schedule.closes_after_s)
        else:
            self.join(threads, deadline)
            self.await_deaths()
        self.closing.set()
        self.pool.close(schedule.drain_s)
        self.join(threads, deadline)
        if any(thread.is_alive() for thread in threads):
            self.faults.append("wake-up: a client never ended")
        asked = sum(len(requests) for requests in schedule.clients)
        if sum(self.ends.values()) != asked and not self.faults:
            self.faults.append(f"ends: {dict(self.ends)} for {asked} requests")
        return self.faults + self.pool.faults_at_the_end()

    def await_deaths(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while dead := self.pool.dead_but_ready():
            if time.monotonic() > deadline:
                self.faults.append(f"deaths: nobody noticed that of {dead}")
                break
            time.sleep(MS)

    @staticmethod
    def join(threads: list[threading.Thread], deadline: float) -> None:
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def client(self, requests: list[Request]) -> None:
        for request in requests:
            time.sleep(request.think_s)
            try:
                end = self.ask(request)
            except (SidecarError, WaitCancelled, LeftOnWait) as exc:
                end = type(exc).__name__
                self.judge(request, exc)
            self.ends[end] += 1

    def ask(self, request: Request) -> str:
        timers: list[threading.Timer] = []

        def on_wait(ticket: Ticket) -> None:
            if request.leaves_on_wait:
                time.sleep(request.hold_s)
                raise LeftOnWait
            if request.cancel_after_s is not None:
                timers.append(threading.Timer(request.cancel_after_s, self.pool.cancel, [ticket]))
                timers[0].start()

        try:
            with self.pool.lease(
                request.spec,
                request.timeout_s,
                pinned=request.spec.hash in self.schedule.pinned,
                exact=request.is_exact,
                on_wait=on_wait,
            ) as lease:
                time.sleep(request.hold_s)
                lease.ended_in_tool_calls = request.calls_tools
        finally:
            for timer in timers:
                timer.cancel()
                timer.join()
        return "served"

    def judge(self, request: Request, exc: Exception) -> None:
        """Whether this request could end so."""
        schedule = self.schedule
        is_expected = {
            LoadFailed: bool(schedule.trouble or schedule.disturbances),
            UpstreamFailed: bool(schedule.disturbances),
            PoolBusy: request.timeout_s < PATIENCE_S,
            LoadTimeout: request.timeout_s < PATIENCE_S or "simulated" in str(exc),
            QueueFull: schedule.config.queue_size < 64,
            PoolClosed: self.closing.is_set(),
            WaitCancelled: request.cancel_after_s is not None,
            LeftOnWait: request.leaves_on_wait,
        }
        if not is_expected.get(type(exc)):
            kind = "wake-up" if isinstance(exc, PoolBusy | LoadTimeout) else "ends"
            self.faults.append(f"{kind}: {request} ended with {exc!r}")

    def disturb(self) -> None:
        chance = random.Random(-self.schedule.seed)
        for pause_s, what in self.schedule.disturbances:
            self.closing.wait(pause_s)
            children, hashes = self.pool.children(), self.pool.hashes()
            if what == "delete" and hashes:
                with contextlib.suppress(SidecarNotFound):
                    self.pool.remove(chance.choice(hashes))
            elif what == "die" and children:
                chance.choice(children).end(9)
            elif what == "stick" and children:
                chance.choice(children).is_stuck = True


def faults_of(seed: int) -> list[str]:
    return [f"seed {seed}: {fault}" for fault in Run(Schedule(seed)).play()]


def seeds() -> list[int]:
    chosen = os.environ.get("SCHEDULE_SEED")
    return [int(chosen)] * 100 if chosen else list(range(SCHEDULES))


def test_no_random_schedule_breaks_a_promise_of_the_pool() -> None:
    before = set(threading.enumerate())
    faults: list[str] = []
    with ThreadPoolExecutor(AT_ONCE) as executor:
        runs = [executor.submit(faults_of, seed) for seed in seeds()]
        for run in runs:
            faults += run.result(PATIENCE_S * 4)
            if faults:
                for other in runs:
                    other.cancel()
                break
    assert not faults, "\n".join(faults[:20]) + "\nSCHEDULE_SEED=N plays one again"
    wait_until(lambda: set(threading.enumerate()) <= before, "no thread is left")


# --- named schedules: what users of such daemons complain of


class Scene:
    """A pool of simulated children whose lives are told by model name."""

    def __init__(self, lives: Mapping[str, Life], changes: Mapping[str, object]) -> None:
        self.lives = lives
        self.pool = SimulatedPool(simulated_config(**changes), self.life_of)

    def life_of(self, spec: SidecarSpec, number: int) -> Life:
        """`name` tells of all its lives, `name 0` of the first only."""
        name = spec.model_id
        return self.lives.get(f"{name} {number}", self.lives.get(name, Life()))

    def lease(self, name: str, timeout_s: float = PATIENCE_S) -> pool.Lease:
        return self.pool.lease(simulated_spec(name), timeout_s)

    def use(self, name: str, *, calls_tools: bool = False) -> Sidecar:
        """One request, begun and ended."""
        with self.lease(name) as lease:
            lease.ended_in_tool_calls = calls_tools
            return lease.sidecar

    def waits(self, count: int) -> None:
        wait_until(lambda: self.pool.counts()[1] == count, f"{count} requests wait")

    def starts(self, name: str) -> int:
        return self.pool.starts.count(simulated_spec(name).hash)


@contextlib.contextmanager
def scene(lives: Mapping[str, Life] | None = None, **changes: object) -> Iterator[Scene]:
    """The pool of a named schedule; at its end everything that was promised held."""
    lives = lives or {}
    made = Scene(lives, changes)
    try:
        yield made
    finally:
        for life in lives.values():
            if life.load_gate:
                life.load_gate.set()
        made.pool.close(0)
    assert made.pool.faults + made.pool.faults_at_the_end() == []


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def test_requests_that_alternate_between_two_models_share_their_loads(
    clients: ThreadPoolExecutor,
) -> None:
    with scene() as here:
        with here.lease("held"):
            asked = []
            for number, name in enumerate("ABABAB", 1):
                asked.append(clients.submit(here.use, name))
                here.waits(number)
        assert [future.result(PATIENCE_S).spec.model_id for future in asked] == list("ABABAB")
        assert here.starts("A") + here.starts("B") == 2


def test_two_waiters_share_one_eviction(clients: ThreadPoolExecutor) -> None:
    gate = threading.Event()
    with scene({"new": Life(load_gate=gate)}, max_sidecars=2) as here:
        here.use("idle")
        with here.lease("busy"):
            asked = [clients.submit(here.use, "new") for _ in range(2)]
            here.waits(2)
            gate.set()
            assert len({future.result(PATIENCE_S) for future in asked}) == 1
            assert here.pool.evictions == 1
            assert {row["model_id"] for row in here.pool.snapshot()} == {"busy", "new"}


def test_two_models_that_need_room_evict_two_at_once(clients: ThreadPoolExecutor) -> None:
    lives = {name: Life(stop_s=1.0) for name in ("old", "older")}
    with scene(lives, max_sidecars=2) as here:
        for name in lives:
            here.use(name)
        asked = [clients.submit(here.use, name) for name in ("new", "newer")]
        wait_until(lambda: here.pool.counts()[0]["stopping"] == 2, "both make room")
        assert [future.result(PATIENCE_S).spec.model_id for future in asked] == ["new", "newer"]


def test_a_model_that_loads_is_not_evicted_for_the_next(clients: ThreadPoolExecutor) -> None:
    gate = threading.Event()
    with scene({"slow": Life(load_gate=gate)}) as here:
        slow = clients.submit(here.use, "slow")
        wait_until(lambda: here.starts("slow"), "its load began")
        cold = clients.submit(here.use, "cold")
        here.waits(2)
        assert here.pool.evictions == 0
        gate.set()
        assert slow.result(PATIENCE_S).spec.model_id == "slow"
        assert cold.result(PATIENCE_S).spec.model_id == "cold"


def test_a_model_just_loaded_serves_who_asked_before_it_is_evicted(
    clients: ThreadPoolExecutor,
) -> None:
    gate = threading.Event()
    with scene({"slow": Life(load_gate=gate)}, fair_wait_s=0.0) as here:
        slow = clients.submit(here.lease, "slow")
        wait_until(lambda: here.starts("slow"), "its load began")
        cold = clients.submit(here.use, "cold")
        here.waits(2)
        gate.set()
        with slow.result(PATIENCE_S) as lease:
            assert lease.sidecar.state is State.READY
        assert cold.result(PATIENCE_S).spec.model_id == "cold"
        assert here.starts("slow") == 1


def test_who_gave_up_holds_up_nobody_behind(clients: ThreadPoolExecutor) -> None:
    with scene() as here:
        with here.lease("held"):
            with pytest.raises(PoolBusy):
                here.lease("left", 0.05)
            behind = clients.submit(here.use, "behind")
            here.waits(1)
        assert behind.result(PATIENCE_S).spec.model_id == "behind"
        assert here.starts("left") == 0


def test_a_model_takes_work_again_once_the_one_it_made_way_for_has_left(
    clients: ThreadPoolExecutor,
) -> None:
    tickets: list[Ticket] = []
    with scene(fair_wait_s=0.02) as here, here.lease("busy") as busy:
        spec = simulated_spec("left")
        left = clients.submit(here.pool.lease, spec, PATIENCE_S, on_wait=tickets.append)
        wait_until(lambda: busy.sidecar.is_draining, "it is to run dry")
        again = clients.submit(here.use, "busy")
        here.waits(2)
        here.pool.cancel(tickets[0])
        assert isinstance(left.exception(PATIENCE_S), WaitCancelled)
        assert again.result(PATIENCE_S) is busy.sidecar


def test_a_model_takes_work_again_once_another_has_made_way(clients: ThreadPoolExecutor) -> None:
    gate = threading.Event()
    lives = {"cold": Life(load_gate=gate)}
    with scene(lives, max_sidecars=2, fair_wait_s=0.02) as here:
        first, second = here.lease("first"), here.lease("second")
        cold = clients.submit(here.use, "cold")
        wait_until(lambda: first.sidecar.is_draining, "the first is to run dry")
        second.__exit__()  # this one is idle before
        wait_until(lambda: here.starts("cold"), "the cold one has its place")
        with here.lease("first", 10.0) as again:
            assert again.sidecar is first.sidecar
        first.__exit__()
        gate.set()
        assert cold.result(PATIENCE_S).spec.model_id == "cold"


def test_a_try_after_the_clients_time_limit_joins_the_load_that_goes_on() -> None:
    gate = threading.Event()
    with scene({"slow": Life(load_gate=gate)}) as here:
        for _ in range(3):
            with pytest.raises(LoadTimeout, match="the load goes on"):
                here.lease("slow", 0.05)
        gate.set()
        assert here.use("slow").requests_total == 1
        assert here.starts("slow") == 1


def test_a_client_that_leaves_as_the_model_becomes_ready_leaves_no_hold_behind() -> None:
    gate = threading.Event()

    def leave(ticket: Ticket) -> None:
        gate.set()
        wait_until(lambda: ticket.sidecar, "it was granted")
        raise LeftOnWait

    with scene({"slow": Life(load_gate=gate)}) as here:
        with pytest.raises(LeftOnWait):
            here.pool.lease(simulated_spec("slow"), PATIENCE_S, on_wait=leave)
        assert here.use("other").spec.model_id == "other"  # so the first could be evicted


def test_a_client_that_leaves_as_the_pool_closes_is_not_waited_for(
    clients: ThreadPoolExecutor,
) -> None:
    gate = threading.Event()
    closings: list[Future[None]] = []

    def leave(ticket: Ticket) -> None:
        gate.set()
        wait_until(lambda: ticket.sidecar, "it was granted")
        closings.append(clients.submit(here.pool.close, 100 * PATIENCE_S))
        wait_until(lambda: here.pool.is_closed, "it closes")
        raise LeftOnWait

    with scene({"slow": Life(load_gate=gate)}) as here:
        with pytest.raises(LeftOnWait):
            here.pool.lease(simulated_spec("slow"), PATIENCE_S, on_wait=leave)
        closings[0].result(PATIENCE_S)


def test_a_client_that_leaves_while_it_is_answered_leaves_its_model_up() -> None:
    def ask_and_leave() -> None:
        with here.lease("m"):
            raise LeftOnWait

    with scene() as here:
        with pytest.raises(LeftOnWait):
            ask_and_leave()
        here.use("m")
        assert here.starts("m") == 1


def test_a_model_whose_child_is_stuck_is_restarted_for_those_who_wait(
    clients: ThreadPoolExecutor,
) -> None:
    with scene(health_interval_s=0.02) as here, here.lease("m") as stuck:
        cold = clients.submit(here.use, "cold")
        here.waits(1)
        child = here.pool.child_of(simulated_spec("m"))
        assert child
        child.is_stuck = True
        assert cold.result(PATIENCE_S).spec.model_id == "cold"
        assert stuck.sidecar.state is State.GONE
        assert here.use("m") is not stuck.sidecar


def test_the_child_that_ran_out_of_memory_gets_the_place_of_one_idle_model() -> None:
    lives = {"big 0": Life(load_error=OUT_OF_MEMORY)}
    with scene(lives, max_sidecars=3) as here:
        here.use("oldest")
        here.use("newer")
        assert here.use("big").state is State.READY
        assert {row["model_id"] for row in here.pool.snapshot()} == {"newer", "big"}


def test_an_eviction_that_was_of_no_use_is_undone_after_those_who_wait(
    clients: ThreadPoolExecutor,
) -> None:
    gate = threading.Event()
    lives = {
        "big 0": Life(load_error=OUT_OF_MEMORY),
        "big 1": Life(load_error=OUT_OF_MEMORY, load_gate=gate),
    }
    with scene(lives, max_sidecars=2) as here:
        here.use("idle")
        big = clients.submit(here.use, "big")
        wait_until(lambda: here.starts("big") == 2, "it is tried again")
        asked = [clients.submit(here.use, name) for name in ("first", "second")]
        here.waits(3)
        gate.set()
        assert isinstance(big.exception(PATIENCE_S), LoadFailed)
        names = [future.result(PATIENCE_S).spec.model_id for future in asked]
        assert names == ["first", "second"]


def test_a_smaller_context_is_served_by_a_larger_one_unless_it_must_be_exact() -> None:
    small, large = simulated_spec("s", 1024, "kin"), simulated_spec("l", 4096, "kin")
    with scene(max_sidecars=2) as here:
        with here.pool.lease(large, PATIENCE_S) as lease:
            loaded = lease.sidecar
        with here.pool.lease(small, PATIENCE_S) as lease:
            assert (lease.sidecar, lease.start_kind) == (loaded, "reused")
        with here.pool.lease(small, PATIENCE_S, exact=True) as lease:
            assert lease.sidecar.spec == small


def test_a_smaller_context_is_served_by_a_larger_one_while_its_own_stops(
    clients: ThreadPoolExecutor,
) -> None:
    small, large = simulated_spec("s", 1024, "kin"), simulated_spec("l", 4096, "kin")
    with scene({"kin": Life(stop_s=1.0)}, max_sidecars=2) as here:
        here.pool.lease(small, PATIENCE_S).__exit__()
        here.pool.lease(large, PATIENCE_S).__exit__()
        removal = clients.submit(here.pool.remove, small.hash)
        wait_until(lambda: here.pool.counts()[0]["stopping"], "its own stops")
        with here.pool.lease(small, PATIENCE_S) as lease:
            assert lease.sidecar.spec == large
            assert here.pool.counts()[0]["stopping"] == 1
        removal.result(PATIENCE_S)


def test_a_child_whose_load_took_too_long_is_ended_before_its_place_is_free() -> None:
    with scene({"slow": Life(times_out=True, stop_s=0.02)}) as here:
        with pytest.raises(LoadTimeout):
            here.lease("slow")
        assert here.use("other").spec.model_id == "other"


def test_an_agent_between_two_steps_keeps_its_model_for_a_steps_time_only(
    clients: ThreadPoolExecutor,
) -> None:
    with scene(step_s=1.0, fair_wait_s=60.0) as here:
        with here.lease("agent") as lease:
            other = clients.submit(here.use, "other")  # waits before the step's time begins
            here.waits(1)
            lease.ended_in_tool_calls = True
        assert here.use("agent", calls_tools=True) is lease.sidecar
        assert other.result(PATIENCE_S).spec.model_id == "other"
        assert time.monotonic() >= lease.sidecar.step_until
        assert here.starts("agent") == 1


def test_steps_do_not_keep_a_model_beyond_the_fair_time(clients: ThreadPoolExecutor) -> None:
    with scene(step_s=600.0, fair_wait_s=0.05) as here:
        here.use("agent", calls_tools=True)
        other = clients.submit(here.use, "other")
        assert other.result(PATIENCE_S).spec.model_id == "other"


@pytest.fixture
def clock_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows' is: the moment that is waited for may be the very moment of waking."""
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: math.floor(clock() * 1000) / 1000)


@pytest.mark.usefixtures("clock_in_steps")
def test_a_clock_that_goes_in_steps_forgets_nobody(clients: ThreadPoolExecutor) -> None:
    for _ in range(100):
        with scene(step_s=600.0, fair_wait_s=0.005) as here:
            here.use("agent", calls_tools=True)
            assert clients.submit(here.use, "other").result(PATIENCE_S)


@pytest.mark.usefixtures("clock_in_steps")
def test_a_clock_that_goes_in_steps_drains_nobody_too_early(clients: ThreadPoolExecutor) -> None:
    for _ in range(50):
        with scene(fair_wait_s=0.005) as here:
            with here.lease("busy") as busy:
                other = clients.submit(here.use, "other")
                wait_until(lambda: busy.sidecar.is_draining, "it is to run dry")
            assert other.result(PATIENCE_S)


def test_who_came_at_the_same_moment_is_ahead_all_the_same(clients: ThreadPoolExecutor) -> None:
    with scene() as here:
        with here.lease("held"):
            for number, name in enumerate(("first", "second"), 1):
                clients.submit(here.use, name)
                here.waits(number)
            first, second = here.pool._waiting
            second.arrived = first.arrived  # as a clock that goes in steps has it
            assert ", 0 ahead " in here.pool.progress(first)
            assert ", 1 ahead " in here.pool.progress(second)
        here.waits(0)


def test_of_two_idle_models_the_one_between_steps_is_kept() -> None:
    with scene(max_sidecars=2, step_s=60.0) as here:
        here.use("agent", calls_tools=True)
        here.use("done")
        here.use("new")
        assert {row["model_id"] for row in here.pool.snapshot()} == {"agent", "new"}


# --- a recorded trace


def test_a_steps_time_saves_loads_and_everybody_is_served() -> None:
    """How long they waited is for `make bench-trace` to say: here a busy machine would."""
    trace = trace_replay.read_trace()
    with ThreadPoolExecutor(2) as executor:
        plain, stepped = executor.map(
            lambda step_s: trace_replay.replay(trace, step_s, scale=300.0), (0.0, 5.0)
        )
    assert len(plain.waits_s) == len(stepped.waits_s) == len(trace) == 200
    assert stepped.loads < 0.75 * plain.loads
