"""Every claim, runnable from the repository root: `python -m experiments.NAME`."""

import importlib.util

_MISSING = [
    name for name, module in {"POT": "ot", "matplotlib": "matplotlib"}.items() if not importlib.util.find_spec(module)
]
if _MISSING:  # one line instead of a stack trace
    raise SystemExit(f"experiments need {' and '.join(_MISSING)}: pip install -e '.[experiments]'")
