from .base import Callback as Callback
from .checkpointing import CheckpointCallback as CheckpointCallback
from .evaluation import EvaluationCallback as EvaluationCallback
from .logging import LogCallback as LogCallback
from .pipeline import PipelineCallback as PipelineCallback
from .pipeline import PreviewCallback as PreviewCallback
from .tracking import TrackerCallback as TrackerCallback
