"""docs/settings.md is what the docstrings say, and the docstrings say something of each option."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gridsession.settings import KINDS

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_of_the_docstrings() -> None:
    script = ROOT / "scripts" / "settings_reference.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == done.stdout, "docs/settings.md is old: make docs"
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"| `{option}`" for option in KINDS]
    assert all(len(row) == 4 and len(row[1]) > 20 for row in rows)
