"""Train diffusion models that stay clean when their training images are not.

Names are loaded on first use, so that importing the package costs nothing.
"""

import importlib.metadata

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = importlib.metadata.version("robustdiff")
