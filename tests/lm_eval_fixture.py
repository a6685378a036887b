"""python -m tests.lm_eval_fixture FOLDER: tests/lm_eval_replies.json out of lm-eval's logs.

FOLDER is what lm-evaluation-harness wrote with --log_samples --output_path FOLDER, for a
task with gsm8k in its name and one with mmlu. Only the model's replies, what was extracted
of them and what was right are kept: no question.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FIXTURE = Path(__file__).with_name("lm_eval_replies.json")


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
    made = {task: samples(Path(argv[0]), task) for task in ("gsm8k", "mmlu")}
    FIXTURE.write_text(json.dumps(made, indent=1) + "\n", encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
