"""Tables of the README that tests generate."""

from __future__ import annotations

import re

from .places import ROOT


def table_in_readme(name: str) -> str:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", readme, re.DOTALL)
    return shown
