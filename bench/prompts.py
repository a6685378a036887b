"""What the sweep asks for: texts of several kinds, as drafts hit more often in some.

Every change of a text changes the numbers, so the run key holds a sum over those in use.
"""

from __future__ import annotations

import hashlib
from typing import Final

_CODE = """\
Write a Python function `merge_intervals(intervals)` that takes a list of (start, end) pairs
of whole numbers and returns them sorted, with overlapping and touching ones joined. Give it
type annotations and a docstring, then write five assertions that show how it behaves for an
empty list, a single pair, nested pairs, touching pairs and pairs in the wrong order."""

_EXPLANATION = """\
Explain to a colleague who writes web pages, but never wrote anything near the metal, why
reading a large array row by row can be many times faster than reading it column by column.
Speak about cache lines and about what the processor fetches ahead of time, and end with one
rule of thumb that is easy to remember."""

_SUMMARY = """\
Summarize the following minutes in four short bullet points, with who does what until when.

The meeting began at nine with Ines, Tomas, Priya and old Mr. Keller from the boatyard. The
harbour's new pump arrived on Tuesday, but its flange has eight holes where the pipe has six.
Priya rang the supplier, who can send an adapter within ten days and will not charge for it.
Tomas would rather weld a plate himself; Keller warned that the insurance does not cover home
made parts below the waterline, and everybody let the matter rest. Ines will order the adapter
today and tell the yard by Friday. The second point was the slipway: the winch's cable shows
broken strands near the drum, so nobody may haul a boat heavier than two tonnes until it is
replaced. Keller will replace it in the last week of the month, if the weather holds; Tomas
puts up a sign this afternoon. Third, the summer regatta needs a second safety boat. Priya will
ask the sailing school across the bay, and wants an answer before the posters are printed on
the twentieth. The meeting closed at ten past ten, later than planned."""

_EXTRACTION = """\
Read the order below and answer with one JSON object only, with the keys "customer", "street",
"city", "items" (a list of objects with "name", "count" and "unit_price") and "total".

Good morning, this is Lena Vargas from the corner shop at 14 Quarry Lane in Millbrook. Please
send us the usual: twelve jars of heather honey at 6.40 each, thirty bars of the oat soap at
2.15, and this time also four of the large beeswax candles, which your list has at 11.90. The
last delivery came a day late, so if you could note that we open at seven, I would be glad. We
pay the whole sum, 188.90, on delivery as always."""

_STORY = """\
Write the opening of a short story about a lighthouse keeper who finds, on the morning after a
storm, that the island is twice as large as it was the evening before. Let her speak with the
mail boat's captain, keep the tone dry and a little comic, and do not explain anything yet."""

_GOODS = "rope lamps oakum tar biscuits canvas nails barrels candles lime salt timber".split()
_PLACES = "Ardbeg Bexley Corran Dunmore Eastwick Farrow Glenside Hollin Inver Jarrow".split()
_WEATHER = "calm hazy bright windy wet foggy mild stormy".split()


def _ledger(days: int) -> str:
    """The log of a warehouse: plain words that repeat their form and not their content."""
    lines = []
    state = 12_345
    for day in range(1, days + 1):
        picks = []
        for _ in range(6):
            state = (state * 1_103_515_245 + 12_345) % 2**31
            picks.append(state >> 12)
        goods, other = _GOODS[picks[0] % 12], _GOODS[picks[1] % 12]
        place, weather = _PLACES[picks[2] % 10], _WEATHER[picks[3] % 8]
        lines.append(
            f"Day {day}: a {weather} morning. {picks[4] % 90 + 10} loads of {goods} came from "
            f"{place}, and {picks[5] % 40 + 5} of {other} left for {_PLACES[picks[5] % 10]}."
        )
    return "\n".join(lines)


_LONG = (
    "Below is the log of a warehouse.\n\n"
    + _ledger(100)
    + "\n\nTell in a few paragraphs what the log shows: which goods came and left most often, "
    "which places stand out, and on which days the weather was bad. Name the days you mean."
)

PROMPTS: Final[dict[str, str]] = {
    "code": _CODE,
    "explanation": _EXPLANATION,
    "summary": _SUMMARY,
    "extraction": _EXTRACTION,
    "story": _STORY,
    "long": _LONG,
}
WARM_UP: Final = "Count from one to thirty in words, one number on each line."


def sums(names: tuple[str, ...]) -> dict[str, str]:
    """The beginning of the SHA-256 of each text."""
    return {name: hashlib.sha256(PROMPTS[name].encode()).hexdigest()[:16] for name in names}
