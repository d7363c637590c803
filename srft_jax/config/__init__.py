"""Every knob of a run. Nothing else reads YAML or flags."""

from srft_jax.config.command_line import Verb, parse, read_yaml, to_yaml
from srft_jax.config.errors import RunError, UsageError
from srft_jax.config.model import ModelConfig, RopeScaling
from srft_jax.config.objective import Aggregation, ObjectiveConfig
from srft_jax.config.sections import (
    ArithmeticConfig,
    DataConfig,
    EvaluationConfig,
    GenerateConfig,
    JsonlConfig,
    MeshConfig,
    ModelSection,
    OptimizerConfig,
    ReportConfig,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
    TrainingConfig,
)

__all__ = [
    "Aggregation",
    "ArithmeticConfig",
    "DataConfig",
    "EvaluationConfig",
    "GenerateConfig",
    "JsonlConfig",
    "MeshConfig",
    "ModelConfig",
    "ModelSection",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ReportConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RopeScaling",
    "RunConfig",
    "RunError",
    "TrainingConfig",
    "UsageError",
    "Verb",
    "parse",
    "read_yaml",
    "to_yaml",
]
