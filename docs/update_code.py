"""Write the code of docs/examples into the pages that show it: ``python docs/update_code.py``.

A page names an example between two comments. What stands between them is generated: the name of the file, and its code.

    <!-- code: tasks.py -->
    <!-- end of code -->

With ``--check`` nothing is written; the exit status is 1 if a page differs from its examples.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^<!-- code: (\S+) -->\n.*?^<!-- end of code -->$", re.MULTILINE | re.DOTALL)


def with_code(page: Path) -> str:
    """Return the text of a page, with the code of its examples as it is now."""

    def block(found: re.Match[str]) -> str:
        example = DOCS / "examples" / found[1]
        link = Path(os.path.relpath(example, page.parent)).as_posix()
        return (
            f"<!-- code: {found[1]} -->\n\n"
            f"[docs/examples/{found[1]}]({link}):\n\n"
            f"```python\n{example.read_text(encoding='utf-8')}```\n\n"
            "<!-- end of code -->"
        )

    return BLOCK.sub(block, page.read_text(encoding="utf-8"))


def main(*arguments: str) -> int:
    """Update all pages, or check them."""
    stale = [page for page in PAGES if with_code(page) != page.read_text(encoding="utf-8")]
    for page in stale:
        if "--check" in arguments:
            print(f"{page.relative_to(DOCS.parent)} differs from its examples: run python docs/update_code.py")
        else:
            page.write_text(with_code(page), encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
