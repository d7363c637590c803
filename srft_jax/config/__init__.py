"""Every knob of a run. Nothing else reads YAML or flags."""

from srft_jax.config.command_line import Verb, parse, read_yaml, to_yaml
from srft_jax.config.errors import RunError, UsageError
from srft_jax.config.lora import LoraConfig
from srft_jax.config.objective import Aggregation, ObjectiveConfig
from srft_jax.config.sections import (
    AdaptedModelConfig,
    ArithmeticConfig,
    DataConfig,
    EvaluationConfig,
    ExportConfig,
    GenerateConfig,
    JsonlConfig,
    MeshConfig,
    ModelConfig,
    ModelSection,
    OptimizerConfig,
    ReportConfig,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
    TrainingConfig,
)

__all__ = [
    "AdaptedModelConfig",
    "Aggregation",
    "ArithmeticConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExportConfig",
    "GenerateConfig",
    "JsonlConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "ModelSection",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ReportConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RunConfig",
    "RunError",
    "TrainingConfig",
    "UsageError",
    "Verb",
    "parse",
    "read_yaml",
    "to_yaml",
]
