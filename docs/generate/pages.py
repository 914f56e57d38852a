"""Writes the generated pages of docs/ anew: all, or those named.

    python docs/generate/pages.py [NAME …]

Tests compare each page with what this would write.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from api_page import api_page
from errors_page import errors_page
from probes_page import probes_page

from moescope.analysis_page import analyses_page
from moescope.edit_page import edits_page
from moescope.store.page import as_markdown as store_page

DOCS = Path(__file__).resolve().parents[1]
_LOG = logging.getLogger("pages")

PAGES: dict[str, Callable[[], str]] = {
    "analyses": analyses_page,
    "api": api_page,
    "edits": edits_page,
    "errors": errors_page,
    "probes": probes_page,
    "store": store_page,
}


def main() -> None:
    """Write what is asked for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*PAGES, []], help="all where none is named")
    for name in parser.parse_args().names or PAGES:
        text = PAGES[name]()
        (DOCS / f"{name}.md").write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
        _LOG.info("docs/%s.md", name)


if __name__ == "__main__":
    main()
