"""Put the tables and numbers of ``results`` into ``README.md``; run it again after new results.

python -m experiments.fill_readme [--check]
"""

import sys
from pathlib import Path

from experiments.paper.tables import fill, load

HERE = Path(__file__).parent


def filled() -> str:
    """The README as the committed results make it."""
    folders = [folder for kind in ("worlds", "images") for folder in sorted((HERE / "results" / kind).iterdir())]
    rows = [row for folder in folders for row in load(folder)]
    return fill((HERE / "README.md").read_text(), rows)


if __name__ == "__main__":
    text = filled()
    if "--check" in sys.argv[1:]:
        sys.exit(0 if text == (HERE / "README.md").read_text() else "README.md does not say what the results say")
    (HERE / "README.md").write_text(text)
