"""Fail when a module in src is longer than one sitting's reading."""

import sys
from pathlib import Path

MAX_LINES = 450


def main() -> int:
    too_long = 0
    for module in sorted(Path("src").rglob("*.py")):
        lines = len(module.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            print(f"{module}: {lines} lines, at most {MAX_LINES}: split it by what it decides")
            too_long += 1
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
