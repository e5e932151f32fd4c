"""The project's pages as data: Python blocks, command lines, links and headings.

Knows Markdown as far as our pages use it: fenced and indented code, code spans, inline links.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("patches/*.md"),
    ]
)

_FENCE = re.compile(r"^```(\w*)$")
_NEEDS = re.compile(r"^<!-- needs: (\w+) -->$")
_INDENT = "    "


class Block(NamedTuple):
    """Fenced code.

    Attributes:
        line: where its code begins in the page, from 1.
        needs: the word of a comment `<!-- needs: word -->` on the line before it; "": none.
    """

    language: str
    line: int
    code: str
    needs: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found, index = [], 0
    while index < len(lines):
        fence = _FENCE.match(lines[index])
        if fence:
            end = lines.index("```", index + 1)
            before = _NEEDS.match(lines[index - 1]) if index else None
            code = "\n".join(lines[index + 1 : end]) + "\n"
            found.append(Block(fence[1], index + 2, code, before[1] if before else ""))
            index = end
        index += 1
    return found


def shell_lines(page: Path) -> Iterator[str]:
    """Indented lines and code spans, comments removed, continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced:
            continue
        elif line.startswith(_INDENT):
            yield re.sub(r"\s#\s.*", "", line).strip()
        else:
            yield from re.findall(r"`([^`]+)`", line)


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(rf"^{_INDENT}.*$", "", text, flags=re.M)
    return re.sub(r"`[^`]*`", "", text)


def links(page: Path) -> list[str]:
    """The targets of a page's links."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
