"""Assertions in the modules that several test files share show their values, as those in the tests do."""

import pytest

pytest.register_assert_rewrite("checkpoints", "helpers", "report_page", "runs", "source_files", "trained")
