"""Errors, seeds, random streams, files that are never half written, signals, what the machine has."""
