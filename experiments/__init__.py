"""Every claim, runnable: `python -m experiments.NAME`."""
