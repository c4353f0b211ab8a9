"""What the records of a model amount to."""

from __future__ import annotations

from collections import Counter
from typing import Any

Result = dict[str, Any]

# Shares and what stays as it was: worth knowing, but no fault.
INFORMATIVE = ("quantized", "plans", "fold")


def record_of(result: Result, check: str) -> dict[str, Any] | None:
    """Return the record of a check, if it was made."""
    return next((r for r in result["records"] if r["check"] == check), None)


def failures(result: Result) -> list[dict[str, Any]]:
    """Return the checks that failed; a share below 1 is no failure."""
    return [
        r
        for r in result["records"]
        if not r["ok"] and not (r["check"].split()[0] in INFORMATIVE and _is_share(r))
    ]


def _is_share(record: dict[str, Any]) -> bool:
    # A fold that failed has the difference of outputs as its value, which its reason repeats.
    value = record.get("value")
    return value is not None and 0 <= value <= 1 and not record["reason"].startswith("outputs differ")


def passed(result: Result) -> bool:
    """Return whether every check was made and passed."""
    return not failures(result)


def shortest_reason(result: Result) -> str:
    """Return the first failure in a line, or nothing."""
    failed = failures(result)
    return f"{failed[0]['check']}: {failed[0]['reason']}" if failed else ""


def text(results: dict[str, Result]) -> str:
    """Return counts, and each failure with the models that have it, most frequent first."""
    good = sum(map(passed, results.values()))
    lines = ["", f"{good} of {len(results)} models passed"]
    causes: dict[str, list[str]] = {}
    for name, result in results.items():
        for record in failures(result):
            causes.setdefault(f"{record['check']}: {_kind(record['reason'])}", []).append(name)
    for cause, names in sorted(causes.items(), key=lambda item: -len(item[1])):
        lines.append(f"{len(names):4}  {cause[:160]}  ({', '.join(names[:3])}{', ...' if names[3:] else ''})")
    return "\n".join(lines)


def _kind(reason: str) -> str:
    """Return a reason without its numbers, so that equal causes look equal."""
    return " ".join(word for word in reason.split() if not any(c.isdigit() for c in word))


def shares(results: dict[str, Result], check: str) -> Counter[str]:
    """Count the models with all, some and none of something."""
    values = [r["value"] for x in results.values() if (r := record_of(x, check)) and r["value"] is not None]
    return Counter("all" if v == 1 else "some" if v else "none" for v in values)
