"""From a configuration, or a network and a loss, to a run folder that is a pipeline."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
