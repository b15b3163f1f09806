"""The code on the pages is run."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


@pytest.mark.parametrize("page", ["write-a-pass.md", "write-a-target.md", "matchers.md"])
def test_the_code_of_a_page_runs(page):
    names = {"__name__": "docs"}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)


def test_the_rule_of_the_tutorial_is_short():
    rule = next(b for b in blocks("write-a-pass.md") if "class FoldScaleIntoLinear" in b).split("\n\n\nproof")[0]
    assert len(rule.splitlines()) <= 25
