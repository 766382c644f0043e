"""Noise schedules, what a network predicts and how it is called, samplers, pipelines on disk."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
