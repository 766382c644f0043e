"""Tests run on one thread each, as several of them run side by side; failures in ``tests/support`` show their values.

Both must be said before anything imports torch, or one of those modules.
"""

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
pytest.register_assert_rewrite(*(path.stem for path in (Path(__file__).parent / "tests" / "support").glob("*.py")))
