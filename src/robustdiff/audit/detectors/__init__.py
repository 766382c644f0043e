"""Kinds of damage, one a file."""
