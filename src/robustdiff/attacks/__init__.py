"""Attacks on a sampler while it draws, purification, poisoned images."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
