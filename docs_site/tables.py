"""A page prepared for narrow screens: where names may be broken, and which cells of tables need room."""

from __future__ import annotations

import html
import re

__all__ = ["breakable", "readable"]

LONG, LONGER = 24, 140  # characters of a cell, from which extra.css gives it a least width
_CELL = re.compile(r"<(?P<tag>t[dh])(?P<rest>(?: [^>]*)?)>(?P<inside>.*?)</(?P=tag)>", re.DOTALL)
_TAG = re.compile(r"(<[^>]+>)")
_PAIR = re.compile(r"(?<=\()(\d+|float), (?=(?:\d+|float)\))")
_PATH = re.compile(
    r"(?<=/)(?=\w)|(?<=[^\W_]_)(?=[^\W_])|(?=::)|(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=\w\()(?=\w+=)"
)
_LONG_WORD = re.compile(r"\b[A-Za-z]{20,}")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
_CODE = re.compile(r"(?P<block><pre\b.*?</pre>)|(?<=<code>).*?(?=</code>)", re.DOTALL)
_NAME = re.compile(r"[\w./:]{24,}")
_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
_DOTTED = re.compile(r"(?<=\w)(?=\.[^\W\d])|(?<=[^\W\d])(?=\.\d)")


def readable(page: str) -> str:
    """Return a page whose tables keep pairs of widths together and break names between their parts."""
    return _CELL.sub(_one, page)


def breakable(page: str) -> str:
    """Return a page whose code outside blocks breaks long names between their parts, and no option."""
    return _CODE.sub(lambda found: found["block"] or _inline(found[0]), page)


def _inline(code: str) -> str:
    parts = _TAG.split(code)
    for place, part in enumerate(parts):
        if not part.startswith("<"):
            whole = _OPTION.sub(r'<span class="whole">\g<0></span>', part)
            parts[place] = _NAME.sub(lambda name: _DOTTED.sub("<wbr>", _PATH.sub("<wbr>", name[0])), whole)
    return "".join(parts)


def _one(found: re.Match[str]) -> str:
    tag, rest, inside = found["tag"], found["rest"], found["inside"]
    text = html.unescape(_TAG.sub("", inside)).strip()
    kind = _kind(text) if tag == "td" and "class=" not in rest else ""
    return f"<{tag}{kind}{rest}>{_broken(inside)}</{tag}>"


def _kind(text: str) -> str:
    if len(text) >= LONG:
        return ' class="long longer"' if len(text) >= LONGER else ' class="long"'
    return ' class="whole"' if "-" in text and " " not in text else ""


def _text(part: str) -> str:
    """Return a text with breaks at the dots of paths and inside long names, and none inside pairs."""
    part = _DOTTED.sub("<wbr>", _PAIR.sub("\\1,\N{NO-BREAK SPACE}", part))
    return _LONG_WORD.sub(lambda word: _HUMP.sub("<wbr>", word[0]), part)


def _broken(inside: str) -> str:
    parts, in_code = _TAG.split(inside), False
    for place, part in enumerate(parts):
        if part.startswith("<"):
            in_code = part.startswith("<code") or (in_code and not part.startswith("</code"))
        else:
            parts[place] = _PATH.sub("<wbr>", part) if in_code else _text(part)
    return "".join(parts)
