"""`robustdiff attack`: which attacks are run, side by side, what they find, and when that must not be believed."""
