"""What all tests share."""

import sys
from pathlib import Path

# Helpers beside the tests (plain.py) are imported by name.
sys.path.insert(0, str(Path(__file__).parent / "attention"))
