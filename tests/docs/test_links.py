"""Every relative link of the pages leads to a file, and to a heading of it where it names one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import documents


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in documents.links(page):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.is_file(), f"{link}: no such file"
        assert path.is_relative_to(documents.ROOT), f"{link}: outside the repository"
        if anchor:
            assert anchor in documents.anchors(path), f"{link}: no such heading"


def test_every_page_is_in_the_index() -> None:
    index = documents.ROOT / "docs" / "README.md"
    listed = {(index.parent / link).resolve() for link in documents.links(index)}
    assert set(index.parent.glob("*.md")) - {index} <= listed


def test_headings_become_anchors() -> None:
    """The rule itself, by cases of the pages."""
    anchors = documents.anchors(documents.ROOT / "docs" / "vllm.md")
    assert "what-falls-back-to-cpu_attn" in anchors
    assert "vllm-the-attention-backend-bmc" in anchors
