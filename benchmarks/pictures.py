"""Draws the pictures of docs from committed results.

    python -m benchmarks.pictures

`docs/pictures/NAME.png` is drawn from `benchmarks/results/NAME.json`. Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.compress_tables import COMPRESS
from benchmarks.tables import ATTENTION, RESULTS, ROOT
from longspan.bench.attention.picture import picture
from longspan.evals import compress_report

PICTURES = ROOT / "docs" / "pictures"


def main(results: Path = RESULTS, pictures: Path = PICTURES) -> int:
    """Draw a picture of every result that has one."""
    for file in sorted(results.glob(ATTENTION)):
        picture(json.loads(file.read_text(encoding="utf-8")), pictures / f"{file.stem}.png")
    for file in sorted(results.glob(COMPRESS)):
        result = json.loads(file.read_text(encoding="utf-8"))
        about = f"{result['model']}, {result['dtype']}, {result['device']}, {result['of']['length']:,} tokens"
        compress_report.picture(result["rows"], about, pictures / f"{file.stem}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
