"""What the unit suite leaves out where it runs on Windows, and why. One list; keep it short.

A name is FILE::TEST, or FILE::TEST[CASE] for one case of it, or FILE for all of a file.
"""

_SIGNALS = "POSIX signals, sessions and process groups; test_windows.py has their likes"
_DEAF = "a process without a console cannot be asked to end there, so it cannot refuse"
_LINKS = "symbolic links are for administrators there, and Wine 8 cannot make them"
_COLON = "llama-server splits this value at each colon, so no path with a drive fits"
_PROC = "it looks into /proc"

REASONS = {
    "test_faults.py::test_dummy": _PROC,
}
