from . import audit as audit
from .audit.result import AuditResult as AuditResult
from .data.corruption import Corruption as Corruption
from .data.dataset import load_images as load_images
from .diffusion.pipeline import load_pipeline as load_pipeline
from .diffusion.pipeline import sample as sample
from .diffusion.schedule import NoiseSchedule as NoiseSchedule
from .evaluation.run import evaluate as evaluate
from .losses.baselines import InputPerturbationLoss as InputPerturbationLoss
from .losses.baselines import InvarianceLoss as InvarianceLoss
from .losses.baselines import PseudoHuberLoss as PseudoHuberLoss
from .losses.denoising import DenoisingLoss as DenoisingLoss
from .losses.equivariance import EquivarianceLoss as EquivarianceLoss
from .training.config import TrainConfig as TrainConfig
from .training.loop import fit as fit
from .training.trainer import train as train

__version__: str
