"""Runs the Python snippets of the documentation."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def run_snippet(page, heading):
    """Run the Python block of a section and return its names."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    names = {"__name__": "snippet"}
    exec(compile(code, f"{page}: {heading}", "exec"), names)
    return names
