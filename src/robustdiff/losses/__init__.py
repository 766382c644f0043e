"""The denoising loss, the equivariance loss, perturbations, images of known noise, baselines."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
