"""The figures on the examples' pages are those of the runs whose records lie beside them."""

import json
import re
from pathlib import Path

import pytest

from peft_caft.evaluation.comparison_report import markdown_report

from ..support.places import EXAMPLES, ROOT

SUMMARIES = sorted(ROOT.glob("examples/*/results/*/summary.json"))
PAGES = [EXAMPLES / page for page in ("molecules/RESULTS.md", "choosing/README.md")]
INTERVAL = re.compile(r"[-+]?\d[\d.,]*%? \([-+]?\d[\d.,]*%? to [-+]?\d[\d.,]*%?\)")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SUMMARIES, ids=name)
def test_report_is_made_of_the_summary(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (path.parent / "comparison.md").read_text(encoding="utf-8") == markdown_report(found)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name)
def test_intervals_on_a_page_are_in_the_reports(page):
    """In README.md only those of its paragraphs on results: other sections have figures of their own."""
    text = page.read_text(encoding="utf-8")
    folder = page.parent / "results"
    if page.name == "README.md" and page.parent == ROOT:
        text, folder = text.split("## Does it help?")[1].split("\n## ")[0], EXAMPLES
    reports = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.md") if path != page)
    published = INTERVAL.findall(text)
    assert len(published) > 3
    assert not [figure for figure in published if figure not in reports]
