"""What is wrong with each image of a set, and from which noise level on it can be trusted."""

import inspect
import sys
import types
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Room(types.ModuleType):
    """``robustdiff.audit`` is this module; called, it is :func:`robustdiff.audit.audit`, which it exists for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - those of audit
        return __getattr__("audit")(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """For help and editors."""
        return inspect.signature(__getattr__("audit"))


# A module's class may be replaced: so one name serves those who call it and those who import from it.
sys.modules[__name__].__class__ = _Room
