"""HTML pages from templates that lie in packages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2


@functools.cache
def template(package: str, name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """A template that escapes every value, and refuses names that it was not given.

    Args:
        package: Where it lies: ``robustdiff.report``.
        name: Of its file.
        filters: Its filters, by name.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(filters)
    return environment.from_string(resources.files(package).joinpath(name).read_text("utf-8"))
