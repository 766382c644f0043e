from .callbacks import EvaluationCallback as EvaluationCallback
from .config import TrainConfig as TrainConfig
from .curriculum import LevelBalancedSampler as LevelBalancedSampler
from .trainer import train as train
