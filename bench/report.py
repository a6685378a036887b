"""What a sweep found: one HTML page, or Markdown, with a verdict for each model.

    python -m bench.report results.jsonl [more.jsonl ...] [--out page.html] [--markdown]

The speed of a cell is (predicted_n - 1) / predicted_ms: the first token comes with the
prompt. Cells of one prompt in one block are a unit, its speed all their tokens by all their
time. A model's speed in a mode is the geometric mean over its units, and its speed-up that of
the ratios to "off", each taken between units of one prompt, first block to first block and
second to second. Since blocks run in the order off, on, on, off, a machine that grows slower
evenly favours nobody.

The 95 % intervals are from a bootstrap that draws prompts and, independently, blocks with
replacement, 10,000 times with a fixed seed, and takes the 2.5th and the 97.5th percentile.
It treats neither the blocks of a prompt nor the prompts of a block as independent of each
other, and so is rather too wide than too narrow. Fewer than four units have no interval.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import journal, page
from bench.page import Cell, Column, Dot, Group, Markup, Value
from bench.progress import duration

DRAWS = 10_000
SEED = 20_24
LEVEL = 0.95
LEAST_UNITS = 4  # with fewer an interval says more of luck than of the machine
OFF, ON = "off", "on"
MIB = 1 << 20
GIB = 1 << 30

Unit = tuple[str, int]  # prompt, block: the how manieth of its mode


# --- what the numbers are


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A geometric mean with its interval, if there are enough units for one."""

    value: float
    low: float | None
    high: float | None
    units: int


@dataclasses.dataclass(frozen=True)
class ModeResult:
    """One model in one mode. Nothing is there for what was not measured."""

    mode: str
    speed: Estimate | None
    speed_up: Estimate | None  # against off; None for off itself
    acceptance: float | None
    drafted: int
    prompt_speed: float | None  # tokens a second
    load_ms: float | None
    rss_bytes: int | None
    vram_bytes: int | None
    equal_texts: int  # prompts of which every text of this mode and of off is the same
    compared_texts: int
    cells: int  # measured well
    failed: tuple[tuple[str, str], ...]  # id, error
    unsupported: str  # why, or empty


@dataclasses.dataclass(frozen=True)
class ModelResult:
    name: str
    modes: tuple[ModeResult, ...]
    unstable_texts: int  # prompts of which off itself gave more than one text
    by_prompt: tuple[PromptRow, ...]

    def mode(self, name: str) -> ModeResult | None:
        return next((mode for mode in self.modes if mode.mode == name), None)

    @property
    def headline(self) -> ModeResult | None:
        """The mode that the verdict is on: "on", else the first that is not off."""
        others = [mode for mode in self.modes if mode.mode != OFF]
        return self.mode(ON) or (others[0] if others else None)


@dataclasses.dataclass(frozen=True)
class PromptRow:
    prompt: str
    mode: str
    off: float
    speed: float
    acceptance: float | None


@dataclasses.dataclass(frozen=True)
class Run:
    """One file of results."""

    path: Path
    header: Mapping[str, Any]
    models: tuple[ModelResult, ...]
    servers: tuple[Mapping[str, Any], ...]
    done: int
    wanted: int | None
    remarks: tuple[str, ...]

    @property
    def is_finished(self) -> bool:
        return self.wanted is not None and self.done >= self.wanted


def interval(
    logs: Mapping[Unit, float], draws: int = DRAWS, seed: int = SEED
) -> tuple[float, float] | None:
    """The percentile interval of exp(mean) where prompts and blocks are both drawn anew.

    A draw that meets no unit, as may be where many are missing, is not counted.
    """
    prompts = sorted({prompt for prompt, _ in logs})
    blocks = sorted({block for _, block in logs})
    if len(logs) < LEAST_UNITS:
        return None
    rng = random.Random(seed)

    @functools.cache
    def sums(chosen: tuple[int, ...]) -> list[tuple[float, int]]:
        rows = [[logs[prompt, b] for b in chosen if (prompt, b) in logs] for prompt in prompts]
        return [(math.fsum(row), len(row)) for row in rows]

    means = []
    for _ in range(draws):
        chosen = tuple(sorted(rng.choices(blocks, k=len(blocks))))
        rows = rng.choices(sums(chosen), k=len(prompts))
        if count := sum(n for _, n in rows):
            means.append(sum(total for total, _ in rows) / count)
    means.sort()
    tail = (1 - LEVEL) / 2
    return math.exp(_quantile(means, tail)), math.exp(_quantile(means, 1 - tail))


def _quantile(ordered: Sequence[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def estimate(logs: Mapping[Unit, float]) -> Estimate | None:
    if not logs:
        return None
    low, high = interval(logs) or (None, None)
    return Estimate(math.exp(statistics.fmean(logs.values())), low, high, len(logs))


def unit_speeds(cells: Iterable[Mapping[str, Any]]) -> dict[Unit, float]:
    """Tokens a second of each unit, from the good cells of one model in one mode."""
    tokens: Counter[Unit] = Counter()
    times_ms: dict[Unit, float] = {}
    for cell in cells:
        unit = cell["prompt"], cell["block"]
        tokens[unit] += cell["predicted_n"] - 1
        times_ms[unit] = times_ms.get(unit, 0.0) + cell["predicted_ms"]
    return {
        unit: tokens[unit] / time_ms * 1000
        for unit, time_ms in times_ms.items()
        if tokens[unit] > 0 and time_ms > 0
    }


def logs_of(speeds: Mapping[Unit, float]) -> dict[Unit, float]:
    return {unit: math.log(speed) for unit, speed in speeds.items()}


def paired_logs(off: Mapping[Unit, float], on: Mapping[Unit, float]) -> dict[Unit, float]:
    """The logarithm of on / off of each unit that both have."""
    return {unit: math.log(on[unit] / off[unit]) for unit in on if unit in off}


# --- from records to results


def read_run(path: Path) -> Run:
    """Raises journal.JournalError or OSError."""
    contents = journal.read(path)
    records = list(contents.records.values())
    planned = [model for model, _ in _planned(contents.header["decides"])]
    names = dict.fromkeys([*planned, *(r["model"] for r in records if "model" in r)])
    remarks = []
    if path.stat().st_size > contents.whole_bytes:
        remarks.append("The last line is not whole: a run is writing it, or was killed there.")
    if contents.broken:
        remarks.append(f"{len(contents.broken)} broken lines are left out.")
    models = [_model(name, [r for r in records if r.get("model") == name]) for name in names]
    wanted = wanted_ids(contents.header["decides"])
    is_cell = [record.get("kind") == "cell" for record in records]
    return Run(
        path,
        contents.header,
        tuple(models),
        tuple(record for record in records if record.get("kind") == "server"),
        sum(is_cell) if wanted is None else _done(wanted, contents.records),
        None if wanted is None else len(wanted),
        tuple(remarks),
    )


def _planned(decides: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The models that a plan names and their modes."""
    try:
        return [(model["id"], list(model["modes"])) for model in decides["models"]]
    except (KeyError, TypeError):
        return []


def wanted_ids(decides: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """The blocks and cells that a plan asks for; None if it is not understood."""
    try:
        return [
            (block, f"{block}/{prompt}/r{repetition}")
            for model, modes in _planned(decides)
            for mode in modes
            for number in range(2 * decides["rounds"])
            for block in [f"{model}/{mode}/b{number}"]
            for prompt in decides["prompts"]
            for repetition in range(decides["repetitions"])
        ]
    except (KeyError, TypeError):
        return None


def _done(wanted: Sequence[tuple[str, str]], records: Mapping[str, Mapping[str, Any]]) -> int:
    """How many have a record, or belong to a server that cannot do what is asked."""
    servers = (record for record in records.values() if record.get("kind") == "server")
    cannot = {
        f"{record['model']}/{record['mode']}/b{record['block']}"
        for record in servers
        if record["outcome"] == "unsupported"
    }
    return sum(cell in records or block in cannot for block, cell in wanted)


def _model(name: str, records: Sequence[Mapping[str, Any]]) -> ModelResult:
    modes = list(dict.fromkeys(record["mode"] for record in records))
    modes.sort(key=lambda mode: (mode != OFF, mode != ON))
    good = {mode: [r for r in records if r["mode"] == mode and _is_good(r)] for mode in modes}
    off = good.get(OFF, [])
    results = [
        _mode(mode, [r for r in records if r["mode"] == mode], good[mode], off) for mode in modes
    ]
    texts = _texts(off)
    rows = [row for mode in modes if mode != OFF for row in _prompt_rows(mode, off, good[mode])]
    unstable = sum(len(seen) > 1 for seen in texts.values())
    return ModelResult(name, tuple(results), unstable, tuple(rows))


def _is_good(record: Mapping[str, Any]) -> bool:
    return bool(record["kind"] == "cell" and record["outcome"] == "ok")


def _mode(
    mode: str,
    records: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
    off: Sequence[Mapping[str, Any]],
) -> ModeResult:
    servers = [record for record in records if record["kind"] == "server"]
    up = [record for record in servers if record["outcome"] == "ok"]
    loads = [record["load_ms"] for record in up if record.get("load_ms") is not None]
    speeds = unit_speeds(cells)
    against = None if mode == OFF else estimate(paired_logs(unit_speeds(off), speeds))
    drafted = sum(cell.get("draft_n") or 0 for cell in cells)
    accepted = sum(cell.get("draft_n_accepted") or 0 for cell in cells)
    prompt_ms = sum(cell["prompt_ms"] for cell in cells)
    texts, off_texts = _texts(cells), _texts(off)
    both = texts.keys() & off_texts.keys()
    unsupported = [record["error"] for record in records if record["outcome"] == "unsupported"]
    return ModeResult(
        mode=mode,
        speed=estimate(logs_of(speeds)),
        speed_up=against,
        acceptance=accepted / drafted if drafted else None,
        drafted=drafted,
        prompt_speed=sum(c["prompt_n"] for c in cells) / prompt_ms * 1000 if prompt_ms else None,
        load_ms=statistics.median(loads) if loads else None,
        rss_bytes=max((r["rss_bytes"] for r in up if r.get("rss_bytes")), default=None),
        vram_bytes=max((r["vram_bytes"] for r in up if r.get("vram_bytes")), default=None),
        equal_texts=sum(len(texts[prompt] | off_texts[prompt]) == 1 for prompt in both),
        compared_texts=len(both),
        cells=len(cells),
        failed=tuple((r["id"], r["error"]) for r in records if r["outcome"] == "error"),
        unsupported=(unsupported[0] or "no reason given") if unsupported else "",
    )


def _texts(cells: Iterable[Mapping[str, Any]]) -> dict[str, set[str]]:
    """The different texts of each prompt, as sums."""
    found: dict[str, set[str]] = {}
    for cell in cells:
        found.setdefault(cell["prompt"], set()).add(cell["text_sha256"])
    return found


def _prompt_rows(
    mode: str, off: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]]
) -> list[PromptRow]:
    rows = []
    for prompt in dict.fromkeys(cell["prompt"] for cell in cells):
        here = [cell for cell in cells if cell["prompt"] == prompt]
        before = unit_speeds(cell for cell in off if cell["prompt"] == prompt)
        after = unit_speeds(here)
        if before and after:
            drafted = sum(cell.get("draft_n") or 0 for cell in here)
            accepted = sum(cell.get("draft_n_accepted") or 0 for cell in here)
            rows.append(
                PromptRow(
                    prompt,
                    mode,
                    statistics.geometric_mean(before.values()),
                    statistics.geometric_mean(after.values()),
                    accepted / drafted if drafted else None,
                )
            )
    return rows


# --- in words


@dataclasses.dataclass(frozen=True)
class Verdict:
    kind: str  # good, bad or neutral, as the page colours it
    words: str


def verdict(model: ModelResult) -> Verdict:
    """One line for a model: "on: 1.42x [1.38, 1.46], worth it"."""
    mode = model.headline
    if not model.modes:
        return Verdict("neutral", "not begun")
    if mode is None:
        return Verdict("neutral", "nothing but off was measured")
    first = mode_verdict(mode)
    rivals = [m for m in model.modes if m.mode not in (OFF, mode.mode) and m.speed_up]
    best = max(rivals, key=lambda m: m.speed_up.value if m.speed_up else 0.0, default=None)
    if (
        best
        and best.speed_up
        and best.speed_up.value > (mode.speed_up.value if mode.speed_up else 0.0)
    ):
        more = mode_verdict(best)
        return Verdict(first.kind, f"{first.words}; fastest is {more.words}")
    return first


def mode_verdict(mode: ModeResult) -> Verdict:
    if mode.unsupported and not mode.cells:
        return Verdict("neutral", f"{mode.mode}: unsupported: {mode.unsupported}")
    if not mode.cells and mode.failed:
        return Verdict("bad", f"{mode.mode}: failed: {mode.failed[0][1]}")
    if mode.speed_up is None:
        return Verdict("neutral", f"{mode.mode}: nothing to compare yet")
    words = f"{mode.mode}: {times(mode.speed_up)}"
    if mode.speed_up.low is None or mode.speed_up.high is None:
        return Verdict("neutral", f"{words}, too few cells to say more")
    if mode.speed_up.low > 1:
        return Verdict("good", f"{words}, worth it")
    if mode.speed_up.high < 1:
        return Verdict("bad", f"{words}, not worth it")
    return Verdict("neutral", f"{words}, no clear difference")


def times(ratio: Estimate) -> str:
    """1.42x [1.38, 1.46]"""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}x"
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def speed_text(speed: Estimate | None) -> str:
    return "" if speed is None else as_value(speed).text


def as_value(found: Estimate, written: str = "") -> Value:
    return Value(found.value, found.low, found.high, written)


def share(part: float | None) -> str:
    return "" if part is None else f"{part:.1%}"


def seconds(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds / 1000:.1f} s"


def memory(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def texts(mode: ModeResult) -> str:
    if mode.mode == OFF or not mode.compared_texts:
        return ""
    return f"{mode.equal_texts} of {mode.compared_texts}"


COLUMNS = (
    Column("model"),
    Column("mode"),
    Column("tok/s", True),
    Column("speed-up", True),
    Column("accepted", True),
    Column("prompt tok/s", True),
    Column("load", True),
    Column("RAM", True),
    Column("VRAM", True),
    Column("texts as off", True),
    Column("cells", True),
)


def row(model: str, mode: ModeResult) -> list[str]:
    failed = f" ({len(mode.failed)} failed)" if mode.failed else ""
    return [
        model,
        mode.mode,
        speed_text(mode.speed) or (mode.unsupported and "unsupported"),
        times(mode.speed_up) if mode.speed_up else "",
        share(mode.acceptance),
        page.short(mode.prompt_speed) if mode.prompt_speed else "",
        seconds(mode.load_ms),
        memory(mode.rss_bytes),
        memory(mode.vram_bytes),
        texts(mode),
        f"{mode.cells}{failed}",
    ]


def state_of(run: Run) -> str:
    """Whether the file is whole, in a sentence."""
    if run.wanted is None:
        return f"{run.done} cells; its header does not say how many it is to have."
    if run.is_finished:
        return f"All {run.wanted} cells are there."
    return f"NOT FINISHED: {run.done} of {run.wanted} cells. Numbers may still change."


def problems(run: Run) -> list[tuple[str, str, str]]:
    """Kind, where, and the error line, of all that failed, cannot be or was left out."""
    skipped = run.header["decides"].get("skipped", [])
    found = [("skipped", str(one.get("id")), str(one.get("reason"))) for one in skipped]
    for model in run.models:
        for mode in model.modes:
            where = f"{model.name}/{mode.mode}"
            if mode.unsupported:
                found.append(("unsupported", where, mode.unsupported))
            for error, ids in _by_error(mode.failed).items():
                more = f" and {len(ids) - 1} more of {where}" if len(ids) > 1 else ""
                found.append(("failed", ids[0] + more, error))
    return found


def _by_error(failed: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, error in failed:
        found.setdefault(error, []).append(name)
    return found


def labels(runs: Sequence[Run]) -> dict[tuple[int, str], str]:
    """How each model of each run is called: with its file where two runs have the name."""
    names = [model.name for run in runs for model in run.models]
    return {
        (number, model.name): model.name
        if names.count(model.name) == 1
        else f"{model.name} ({run.path.stem})"
        for number, run in enumerate(runs)
        for model in run.models
    }


# --- Markdown


def as_markdown(runs: Sequence[Run]) -> str:
    named = labels(runs)
    parts = ["# Does MTP pay?\n"]
    for run in runs:
        parts.append(f"`{run.path.name}`: {state_of(run)} {' '.join(run.remarks)}".strip() + "\n")
    models = [(named[n, m.name], m) for n, run in enumerate(runs) for m in run.models]
    parts.append("".join(f"- **{name}**: {verdict(model).words}\n" for name, model in models))
    rows = [row(name, mode) for name, model in models for mode in model.modes]
    parts.append(page.markdown_table(COLUMNS, rows))
    wrong = [problem for run in runs for problem in problems(run)]
    if wrong:
        parts.append("## Failed, unsupported, skipped\n")
        parts.append(page.markdown_table([Column(c) for c in ("kind", "cell", "error")], wrong))
    parts.append(METHOD + "\n")
    return "\n".join(parts)


METHOD = (
    "Speeds are (predicted_n - 1) / predicted_ms, geometric means over prompts and blocks; the "
    "speed-up is the geometric mean of the ratios to off, paired by prompt and block. "
    f" Intervals are 95 %, by a bootstrap over prompts and blocks ({DRAWS:,} draws, seed "
    f"{SEED}). Two speeds whose intervals overlap may still differ clearly: the intervals of "
    "speeds hold the spread between prompts, which the paired speed-up does not. "
    '"Texts as off" counts the prompts whose every text was the same in both modes.'
)


# --- the page


def as_html(runs: Sequence[Run]) -> str:
    named = labels(runs)
    models = [(named[n, m.name], m) for n, run in enumerate(runs) for m in run.models]
    modes = list(dict.fromkeys(mode.mode for _, model in models for mode in model.modes))
    modes.sort(key=lambda mode: (mode != OFF, mode != ON, mode))
    return page.page(
        "Does MTP pay?",
        *(_state_note(run) for run in runs),
        _verdicts(models),
        *_charts(models, modes),
        page.heading("All numbers"),
        page.table(COLUMNS, [cells for name, model in models for cells in _rows(name, model)]),
        page.note(METHOD),
        _unstable(models),
        *_problems(runs),
        page.heading("Drafts, prompts, loading, memory"),
        *_more_charts(models, modes),
        page.heading("By prompt"),
        *(_by_prompt(name, model) for name, model in models if model.by_prompt),
        page.heading("The runs"),
        *(_about(run) for run in runs),
    )


def _rows(name: str, model: ModelResult) -> list[list[Cell]]:
    """The name stands once, over the modes below it."""
    rows: list[list[Cell]] = [[*row(name, mode)] for mode in model.modes]
    for later in rows[1:]:
        later[0] = Markup("")
    return rows


def _state_note(run: Run) -> Markup:
    words = f"{run.path.name}: {state_of(run)} {' '.join(run.remarks)}".strip()
    return page.note(words, is_warning=not run.is_finished or bool(run.remarks))


def _verdicts(models: Sequence[tuple[str, ModelResult]]) -> Markup:
    rows: list[list[Cell]] = []
    for name, model in models:
        found = verdict(model)
        rows.append([page.tag("strong", name), page.badge(found.words, found.kind)])
    return page.table([Column("model"), Column("verdict")], rows)


def _charts(models: Sequence[tuple[str, ModelResult]], modes: Sequence[str]) -> list[Markup]:
    others = [mode for mode in modes if mode != OFF]
    speeds = [
        Group(name, [_speed_value(model.mode(mode)) for mode in modes]) for name, model in models
    ]
    ratios = [
        Dot(name if len(others) == 1 else f"{name}, {mode}", _ratio_value(model.mode(mode)))
        for name, model in models
        for mode in others
    ]
    return [
        page.bars("Generation speed, with 95 % intervals", modes, speeds, "tokens a second"),
        page.forest("Speed-up against off, paired, with 95 % intervals", ratios, 1.0, "times"),
    ]


def _more_charts(models: Sequence[tuple[str, ModelResult]], modes: Sequence[str]) -> list[Markup]:
    others = [mode for mode in modes if mode != OFF]
    shares = _shares(models, others)
    charts = [
        page.bars("Accepted drafts", others, shares, "% of drafted tokens", first_colour=1)
    ] * _has_values(shares)
    for title, field, divisor, unit in (
        ("Prompt speed", "prompt_speed", 1, "tokens a second"),
        ("Load time", "load_ms", 1000, "seconds"),
        ("Memory of the process", "rss_bytes", GIB, "GiB"),
        ("Memory of the GPU", "vram_bytes", GIB, "GiB"),
    ):
        groups = _plain(models, modes, field, divisor)
        charts += [page.bars(title, modes, groups, unit)] * _has_values(groups)
    return charts


def _has_values(groups: Sequence[Group]) -> bool:
    return any(isinstance(value, Value) for group in groups for value in group.values)


def _speed_value(mode: ModeResult | None) -> Value | str | None:
    if mode is None:
        return None
    return as_value(mode.speed) if mode.speed else _missing(mode)


def _ratio_value(mode: ModeResult | None) -> Value | str | None:
    if mode is None:
        return None
    return as_value(mode.speed_up, times(mode.speed_up)) if mode.speed_up else _missing(mode)


def _missing(mode: ModeResult) -> str:
    if mode.unsupported:
        return "unsupported"
    return "failed" if mode.failed else "not measured"


def _shares(models: Sequence[tuple[str, ModelResult]], modes: Sequence[str]) -> list[Group]:
    def value(mode: ModeResult | None) -> Value | str | None:
        if mode is None or mode.acceptance is None:
            return _missing(mode) if mode else None
        return Value(mode.acceptance * 100, written=share(mode.acceptance))

    return [Group(name, [value(model.mode(mode)) for mode in modes]) for name, model in models]


def _plain(
    models: Sequence[tuple[str, ModelResult]], modes: Sequence[str], field: str, divisor: float
) -> list[Group]:
    def value(mode: ModeResult | None) -> Value | str | None:
        number = None if mode is None else getattr(mode, field)
        if number is None:
            return _missing(mode) if mode else None
        return Value(number / divisor)

    return [Group(name, [value(model.mode(mode)) for mode in modes]) for name, model in models]


def _unstable(models: Sequence[tuple[str, ModelResult]]) -> Markup:
    found = [f"{name} ({model.unstable_texts})" for name, model in models if model.unstable_texts]
    if not found:
        return Markup("")
    words = "Prompts whose text differed between two runs of off itself: " + ", ".join(found)
    return page.note(f"{words}. A text that differs from off says little there.", is_warning=True)


def _problems(runs: Sequence[Run]) -> list[Markup]:
    rows: list[list[Cell]] = [
        [page.badge(kind, "bad" if kind == "failed" else "neutral"), name, page.code(error or "?")]
        for run in runs
        for kind, name, error in problems(run)
    ]
    if not rows:
        return []
    columns = [Column(title) for title in ("kind", "cell", "first error line")]
    return [page.heading("Failed, unsupported, skipped"), page.table(columns, rows)]


def _by_prompt(name: str, model: ModelResult) -> Markup:
    columns = [Column("prompt"), Column("mode")]
    columns += [Column(t, True) for t in ("off tok/s", "tok/s", "speed-up", "accepted")]
    rows: list[list[Cell]] = [
        [r.prompt, r.mode, r.off, r.speed, f"{r.speed / r.off:.2f}x", share(r.acceptance)]
        for r in model.by_prompt
    ]
    return page.details(name, page.table(columns, rows))


def _about(run: Run) -> Markup:
    builds = sorted({str(s["build_info"]) for s in run.servers if s.get("build_info")})
    contexts = sorted({int(s["n_ctx"]) for s in run.servers if s.get("n_ctx")})
    rows: list[list[Cell]] = [
        ["file", str(run.path)],
        ["run key", str(run.header.get("run_key", ""))],
    ]
    rows += [["llama-server", ", ".join(builds)], ["context", ", ".join(map(str, contexts))]]
    measured = sum(s.get("load_ms") or 0 for s in run.servers) / 1000
    rows += [["server starts", f"{len(run.servers)}, {duration(measured)} of loading"]]
    rows += [[name, _plainly(value)] for name, value in (run.header.get("about") or {}).items()]
    commands = [
        page.paragraph(page.code(f"{s['model']} {s['mode']}: " + " ".join(map(str, s["argv"]))))
        for s in run.servers
        if s.get("argv") and s.get("block") == 0
    ]
    plan = page.preformatted(json.dumps(run.header.get("decides"), indent=1, ensure_ascii=False))
    return page.details(
        run.path.name,
        page.table([Column("what"), Column("value")], rows),
        page.details("command lines", *commands) if commands else "",
        page.details("plan", plan),
    )


def _plainly(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- the command


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        runs = [read_run(path) for path in arguments.results]
        if arguments.markdown:
            print(as_markdown(runs), end="")
        target = arguments.out
        if target is None and not arguments.markdown:
            target = arguments.results[0].with_suffix(".html")
        if target is not None:
            journal.write_whole(target, as_html(runs).encode())
            print(f"report: {target}", file=sys.stderr)
    except (journal.JournalError, OSError) as exc:
        print(f"report: {exc}", file=sys.stderr)
        return 1
    except KeyError as exc:
        print(f"report: a record lacks its {exc}: written by another version?", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("report: interrupted; say the same again", file=sys.stderr)
        return 130
    if not arguments.markdown:
        for run in runs:
            print(state_of(run))
            for model in run.models:
                print(f"{model.name}  {verdict(model).words}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description="Does MTP pay? One page from a sweep's results."
    )
    parser.add_argument("results", nargs="+", type=Path, help="files that a sweep wrote")
    parser.add_argument(
        "--out", type=Path, help="the HTML page (default: beside the first file, unless --markdown)"
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
