"""The report's numbers against tables reckoned by hand, its words, and its page in a browser."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench import report
from tests import sweep_records
from tests.browser import opened
from tests.sweep_records import cell, measured, plan, server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Off makes 50, 100, 40 tokens a second, in its second block a tenth less; on is 1.5, 1.2 and
# 1.3 times that. Geometric means: off (50*45*100*90*40*36)^(1/6) = 55.4330, and the speed-up
# (1.5*1.2*1.3)^(1/3) = 1.327614.
OFF = {"code": (50.0, 45.0), "story": (100.0, 90.0), "facts": (40.0, 36.0)}
ON = {"code": (75.0, 67.5), "story": (120.0, 108.0), "facts": (52.0, 46.8)}
SLOW = {prompt: tuple(speed * 0.8 for speed in speeds) for prompt, speeds in OFF.items()}
PERHAPS = {"code": (55.0, 49.5), "story": (100.0, 90.0), "facts": (38.8, 34.92)}
SAME = {"code": (51.0, 44.0), "story": (99.0, 91.0), "facts": (40.0, 36.0)}


def of_one_model(folder: Path, records: list[dict[str, Any]]) -> report.ModelResult:
    file = sweep_records.write(folder / "r.jsonl", plan({"m": ["off", "on"]}), records)
    (model,) = report.read_run(file).models
    return model


def mode_of(model: report.ModelResult, name: str) -> report.ModeResult:
    mode = model.mode(name)
    assert mode is not None
    return mode


def test_speeds_and_speed_up_are_the_geometric_means_of_the_units(tmp_path: Path) -> None:
    records = measured("m", "off", OFF) + measured("m", "on", ON, drafted=80, accepted=60)
    model = of_one_model(tmp_path, records)
    off, on = mode_of(model, "off"), mode_of(model, "on")
    assert off.speed is not None
    assert on.speed is not None
    assert on.speed_up is not None
    assert off.speed.value == pytest.approx((50 * 45 * 100 * 90 * 40 * 36) ** (1 / 6))
    assert on.speed_up.value == pytest.approx((1.5 * 1.2 * 1.3) ** (1 / 3))
    assert on.speed.value / off.speed.value == pytest.approx(on.speed_up.value)
    assert on.acceptance == 0.75
    assert off.acceptance is None
    assert off.prompt_speed == pytest.approx(500)
    assert off.load_ms == 1750
    assert off.rss_bytes == 3 << 29
    assert (on.equal_texts, on.compared_texts) == (3, 3)


def test_a_unit_is_all_tokens_by_all_time(tmp_path: Path) -> None:
    cells = [cell("m", "off", 0, "code", rep, speed=speed) for rep, speed in enumerate((50, 100))]
    assert report.unit_speeds(cells) == {("code", 0): pytest.approx(200 / 3)}


def test_the_interval_holds_what_three_prompts_can_tell() -> None:
    logs = {
        (p, b): math.log(r) for p, r in zip("abc", (1.2, 1.3, 1.5), strict=True) for b in (0, 1)
    }
    found = report.interval(logs)
    assert found is not None
    low, high = found
    # All three draws on the lowest or the highest has 1 chance in 27: beyond 2.5 % of a side.
    assert low == pytest.approx(1.2)
    assert high == pytest.approx(1.5)
    assert report.interval(logs) == found, "the seed is fixed"


def test_the_interval_of_many_prompts_is_that_of_the_normal_law() -> None:
    """40 prompts of spread 0.1: exp(0 -+ 1.96 * 0.1 / sqrt(40)), where blocks all agree."""
    steps = [statistics.NormalDist(0, 0.1).inv_cdf((n + 0.5) / 40) for n in range(40)]
    logs = {(str(n), block): step for n, step in enumerate(steps) for block in (0, 1)}
    found = report.interval(logs)
    assert found is not None
    assert found == pytest.approx((math.exp(-0.031), math.exp(0.031)), abs=0.002)


def test_prompts_of_one_block_are_not_taken_for_independent() -> None:
    """A block in which everything was a fifth faster shows in the interval, however many
    prompts there are."""
    logs = {(str(n), block): block * math.log(1.2) for n in range(30) for block in (0, 1)}
    found = report.interval(logs)
    assert found is not None
    assert found == pytest.approx((1.0, 1.2))


def test_what_is_not_in_both_modes_is_left_out_of_the_speed_up(tmp_path: Path) -> None:
    records = measured("m", "off", OFF) + measured("m", "on", ON)
    records = [r for r in records if r["id"] not in ("m/on/b0/code/r0", "m/off/b1/story/r0")]
    on = mode_of(of_one_model(tmp_path, records), "on")
    assert on.speed_up is not None
    assert on.speed_up.units == 4
    assert on.speed_up.value == pytest.approx((1.5 * 1.2 * 1.3 * 1.3) ** (1 / 4))


@pytest.mark.parametrize(
    ("speeds", "expected", "kind"),
    [
        (ON, "on: 1.33x [1.20, 1.50], worth it", "good"),
        (SLOW, "on: 0.80x [0.80, 0.80], not worth it", "bad"),
        (PERHAPS, "on: 1.02x [0.97, 1.10], no clear difference", "neutral"),
        (SAME, "on: 1.00x [0.99, 1.01], no clear difference", "neutral"),
    ],
)
def test_a_verdict_needs_its_whole_interval_on_one_side(
    tmp_path: Path, speeds: sweep_records.Speeds, expected: str, kind: str
) -> None:
    model = of_one_model(tmp_path, measured("m", "off", OFF) + measured("m", "on", speeds))
    assert report.verdict(model) == report.Verdict(kind, expected)


def test_three_units_are_too_few_for_a_verdict(tmp_path: Path) -> None:
    one = {prompt: speeds[:1] for prompt, speeds in OFF.items()}
    two = {prompt: speeds[:1] for prompt, speeds in ON.items()}
    model = of_one_model(tmp_path, measured("m", "off", one) + measured("m", "on", two))
    assert report.verdict(model).words == "on: 1.33x, too few cells to say more"


def test_a_faster_mode_is_named_beside_the_one_that_is_asked_for(tmp_path: Path) -> None:
    fast = {prompt: tuple(2 * speed for speed in speeds) for prompt, speeds in OFF.items()}
    records = measured("m", "off", OFF) + measured("m", "on", ON) + measured("m", "on-n2", fast)
    words = report.verdict(of_one_model(tmp_path, records)).words
    assert words == (
        "on: 1.33x [1.20, 1.50], worth it; fastest is on-n2: 2.00x [2.00, 2.00], worth it"
    )


def test_unsupported_and_failed_have_their_error_line(tmp_path: Path) -> None:
    modes = {"a": ["off", "on"], "b": ["off", "on"], "c": ["off", "on"]}
    wrong = "no MTP head in 'a' | <at all>"
    records = [
        *measured("a", "off", OFF),
        *(server("a", "on", b, outcome="unsupported", error=wrong, load_ms=None) for b in (0, 1)),
        *measured("b", "off", OFF),
        *(server("b", "on", b, outcome="error", error="out of memory", load_ms=None) for b in (0,)),
        *(cell("b", "on", b, p, error="out of memory") for b in (0, 1) for p in OFF),
        *measured("c", "off", OFF),
    ]
    decides = plan(modes) | {"skipped": [{"id": "whisper", "reason": "is no llama-server"}]}
    run = report.read_run(sweep_records.write(tmp_path / "r.jsonl", decides, records))
    words = [report.verdict(model).words for model in run.models]
    assert words == [
        f"on: unsupported: {wrong}",
        "on: failed: out of memory",
        "nothing but off was measured",
    ]
    assert (run.done, run.wanted) == (30, 36)
    assert "NOT FINISHED: 30 of 36 cells" in report.state_of(run)
    markdown = report.as_markdown([run])
    assert "no MTP head in 'a' \\| &lt;at all>" in markdown
    assert "| skipped | whisper | is no llama-server |" in markdown
    assert "| failed | b/on/b0/server and 6 more of b/on | out of memory |" in markdown


def test_texts_that_differ_are_counted_by_prompt(tmp_path: Path) -> None:
    on = measured("m", "on", ON)
    on[-1]["text_sha256"] = "other"
    off = measured("m", "off", OFF)
    off[2]["text_sha256"] = "at times"
    model = of_one_model(tmp_path, off + on)
    assert (mode_of(model, "on").equal_texts, mode_of(model, "on").compared_texts) == (1, 3)
    assert model.unstable_texts == 1


def test_a_file_that_is_being_written_is_reported_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.jsonl"
    sweep_records.write(file, plan({"m": ["off", "on"]}), measured("m", "off", OFF))
    with file.open("ab") as torn:
        torn.write(b'{"id": "m/on/b0/co')
    assert report.main([str(file)]) == 0
    page = file.with_suffix(".html").read_text(encoding="utf-8")
    assert "NOT FINISHED: 6 of 12 cells" in page
    assert "The last line is not whole" in page
    assert "m  nothing but off was measured" in capsys.readouterr().out


def test_a_header_alone_is_reported(tmp_path: Path) -> None:
    file = sweep_records.write(tmp_path / "r.jsonl", plan({"m": ["off", "on"]}), [])
    assert report.main([str(file), "--out", str(tmp_path / "o.html")]) == 0
    assert "NOT FINISHED: 0 of 12" in (tmp_path / "o.html").read_text(encoding="utf-8")


def test_models_of_the_same_name_in_two_files_are_told_apart(tmp_path: Path) -> None:
    files = [
        sweep_records.write(
            tmp_path / f"{n}.jsonl", plan({"m": ["off"]}), measured("m", "off", OFF)
        )
        for n in ("then", "now")
    ]
    markdown = report.as_markdown([report.read_run(file) for file in files])
    assert "| m (then) | off |" in markdown
    assert "| m (now) | off |" in markdown


def test_what_is_no_file_of_results_is_said_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text("hello\n")
    assert report.main([str(tmp_path / "x.jsonl")]) == 1
    assert report.main([str(tmp_path / "none.jsonl")]) == 1
    said = capsys.readouterr().err
    assert "its first line is no header" in said
    assert "No such file" in said


# --- in a browser


def eight_models(folder: Path) -> Path:
    """A night's results, with all that can go wrong in them."""
    modes = ["off", "on", "on-n1"]
    names = [
        "qwen3-coder-30b-a3b-instruct-q4_k_m",
        "glm-4.5-air-ud-q2_k_xl",
        "gemma-3-27b-it-qat-q4_0",
        "a-model-with-a-name-that-somebody-made-far-too-long-for-any-column-iq4_xs.gguf",
        "mtp-less",
        "broken",
        "never-begun",
    ]
    records: list[dict[str, Any]] = []
    for number, name in enumerate(names[:4]):
        factor = (0.6, 1.0, 1.4, 3.1)[number]
        gain = (1.1, 0.75, 1.0, 1.0)[number]
        for mode, ratio in (("off", 1.0), ("on", gain), ("on-n1", (1 + gain) / 2)):
            base = SAME if mode == "off" else (ON if gain > 1 else OFF)
            speeds = {p: tuple(s * factor * ratio for s in all_) for p, all_ in base.items()}
            drafts = {} if mode == "off" else {"drafted": 80, "accepted": 50 + 5 * number}
            text = "another text" if (mode, number) == ("on", 1) else sweep_records.LOREM
            found = measured(name, mode, speeds, text=text, **drafts)
            for record in found:
                if record["kind"] == "server":
                    record["vram_bytes"] = (9 + number + (mode != "off")) << 30
            records += found
    records += measured(names[4], "off", OFF)
    records += [
        server(names[4], mode, b, outcome="unsupported", error="the GGUF (llama) has no layers for "
               "multi-token prediction", load_ms=None, rss_bytes=None)
        for mode in modes[1:] for b in (0, 1)
    ]  # fmt: skip
    records += [
        cell(names[5], mode, b, p, error="CUDA error: <out of memory> & so on")
        for mode in modes for b in (0, 1) for p in OFF
    ]  # fmt: skip
    return sweep_records.write(folder / "night.jsonl", plan(dict.fromkeys(names, modes)), records)


@pytest.mark.parametrize("width", [1100, 420])
def test_the_page_can_be_read_and_asks_nobody(browser: Browser, tmp_path: Path, width: int) -> None:
    file = eight_models(tmp_path)
    assert report.main([str(file)]) == 0
    with opened(browser, file.with_suffix(".html"), width=width) as view:
        assert view.collisions() == []
        assert not view.is_scrolled_sideways()
        assert (view.complaints, view.requests) == ([], [])
        assert view.page.locator("table").first.locator("tbody tr").count() == 7
        assert view.page.locator("svg").count() == 7
        view.page.screenshot(path=tmp_path / f"page-{width}.png", full_page=True)


def test_the_bars_of_the_page_stand_in_proportion(browser: Browser, tmp_path: Path) -> None:
    file = eight_models(tmp_path)
    run = report.read_run(file)
    assert report.main([str(file)]) == 0
    script = (
        "[...document.querySelector('svg').querySelectorAll('.bar')]"
        ".map(bar => bar.getBoundingClientRect().width)"
    )
    with opened(browser, file.with_suffix(".html")) as view:
        widths = view.page.evaluate(script)
    speeds = [
        mode.speed.value
        for model in run.models
        for mode in sorted(model.modes, key=lambda m: ("off", "on", "on-n1").index(m.mode))
        if mode.speed
    ]
    assert len(speeds) == 13
    for width, speed in zip(widths, speeds, strict=True):
        assert width / widths[0] == pytest.approx(speed / speeds[0], rel=0.02)
