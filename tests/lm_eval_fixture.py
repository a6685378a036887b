"""python -m tests.lm_eval_fixture FOLDER: tests/lm_eval_replies.json out of lm-eval's logs.

FOLDER is what lm-evaluation-harness wrote with --log_samples --output_path FOLDER, for a
task with gsm8k in its name and one with mmlu. Only the model's replies, what was extracted
of them and what was right are kept: no question. A small model is hardly ever right, so
replies of our own (MADE) are put through the harness's filters too: run this with the
Python in whose environment it is installed.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

FIXTURE = Path(__file__).with_name("lm_eval_replies.json")

COMPARED = {"ignore_case": True, "ignore_punctuation": False}
IGNORED = [",", "\\$", "(?s).*#### ", "\\.$"]  # as its gsm8k.yaml has it
FILTERS: dict[str, dict[str, Any]] = {
    "strict-match": {"regex_pattern": r"#### (\-?[0-9\.\,]+)"},
    "flexible-extract": {"regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "group_select": -1},
}
MADE = [  # a reply, and what is right
    ("It is so.\n#### 18", "18"),
    ("#### 18.", "18"),
    ("#### $18", "18"),
    ("####18", "18"),
    ("#### 1,050,000", "1050000"),
    ("#### -5", "-5"),
    ("That makes 18 dollars", "18"),
    ("That makes $18.", "18"),
    ("18.00", "18"),
    ("between 3 and 4...", "4"),
    ("no number at all", "7"),
    ("", "7"),
    ("#### 5\n#### 6", "6"),
    ("#### 5\n#### 6", "5"),
    ("The answer is **42**.", "42"),
    ("\\boxed{1,234}", "1234"),
    ("12, 13 and 14,", "14"),
    ("A 5-year-old has 3", "3"),
    ("x = 7\n\n#### seven", "7"),
    ("#### 007", "7"),
    ("#### 7%", "7"),
    ("total: 1 000", "1000"),
    ("#### 3.0", "3"),
    ("#### 3.", "3"),
    ("-$8", "-8"),
    ("#### 12 eggs\nSo 13", "12"),
    ("7\u00bd", "7"),
]


def made() -> list[dict[str, Any]]:
    """As `samples`, for replies of our own. Needs lm_eval."""
    return [
        {"id": number, "reply": reply, "gold": gold, **_judged(reply, gold)}
        for number, (reply, gold) in enumerate(MADE)
    ]


def _judged(reply: str, gold: str) -> dict[str, dict[str, Any]]:
    extraction = importlib.import_module("lm_eval.filters.extraction")
    metrics = importlib.import_module("lm_eval.api.metrics")
    extracted, is_right = {}, {}
    for name, settings in FILTERS.items():
        found = extraction.RegexFilter(**settings).apply([[reply]], [{}])
        extracted[name] = next(iter(next(iter(found))))
        judged = metrics.exact_match_fn(
            predictions=[extracted[name]],
            references=[f"#### {gold}"],
            regexes_to_ignore=IGNORED,
            **COMPARED,
        )
        is_right[name] = bool(judged["exact_match"])
    return {"extracted": extracted, "is_right": is_right}


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """One row a reply: `extracted` and `is_right` hold a value for each filter's name."""
    (file,) = folder.rglob(f"samples_{task}*.jsonl")
    found: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        logged = json.loads(line)
        kept = found.setdefault(
            logged["doc_id"],
            {
                "id": logged["doc_id"],
                "prompt_sha256": logged["prompt_hash"],
                "reply": logged["resps"][0][0],
                "gold": logged["target"].rpartition("#### ")[2],
                "extracted": {},
                "is_right": {},
            },
        )
        kept["extracted"][logged["filter"]] = logged["filtered_resps"][0]
        kept["is_right"][logged["filter"]] = bool(logged["exact_match"])
    return [found[number] for number in sorted(found)]


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m tests.lm_eval_fixture FOLDER", file=sys.stderr)
        return 2
    logged = {task: samples(Path(argv[0]), task) for task in ("gsm8k", "mmlu")}
    text = json.dumps(logged | {"made": made()}, indent=1)
    FIXTURE.write_text(text + "\n", encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
