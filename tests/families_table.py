"""Writes the table in `alvts_cli/families/README.md`: `python tests/families_table.py`.

A cell is the outcome of the tests of a column for the family of a row, as they ran a moment ago.
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "alvts_cli" / "families" / "README.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"

COLUMNS = {
    "keep 1.0 is dense": "test_keeping_all_is_dense_bit_for_bit",
    "image, later text": "test_selection_and_later_text_equal_recomputing",
    "several images": "test_two_images",
    "video": "test_a_video",
    "video and image": "test_a_video_behind_an_image",
    "padded batches": "test_a_padded_batch_equals_its_samples",
    "beams": "test_beams",
    "scores": "test_scores_are_of_the_layers_own_attention",
}
"""Heads, and the tests below them, both attention kernels where a test has them."""


class Outcomes:
    """Collects what pytest reports."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], set[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest after every phase of a test."""
        match = re.search(r"::(\w+)\[(?:(?:sdpa|eager)-)?(.+)\]$", report.nodeid)
        if match and (report.when == "call" or not report.passed):
            self.found.setdefault((match[1], match[2]), set()).add(report.outcome)


def table(outcomes: Outcomes, kinds: list[str]) -> str:
    """In Markdown: `yes` where all passed, `no` where one did not, `-` where there is no test."""

    def cell(kind: str, test: str) -> str:
        found = outcomes.found.get((test, kind))
        return "-" if not found else "yes" if found == {"passed"} else "no"

    rows = [["family", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    rows += [[f"`{kind}`", *(cell(kind, test) for test in COLUMNS.values())] for kind in kinds]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    """Run the tests and put the table into the README; 1 where a test failed."""
    outcomes = Outcomes()
    # Not the test of the table itself, which a new family is about to enter.
    these = ["-q", "-n", "0", "-k", "not readme", str(FOLDER / "test_families.py")]
    code = pytest.main(these, plugins=[outcomes])
    from zoo import KINDS

    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(before + BEGIN + table(outcomes, list(KINDS)) + END + after)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
