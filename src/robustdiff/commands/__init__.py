"""The `robustdiff` command: one file per command, its flags and its `run`."""
