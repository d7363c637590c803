"""Every knob of a run. Nothing else reads YAML or flags."""

from srft_jax.config.command_line import Verb, parse, read_yaml, to_yaml
from srft_jax.config.data import (
    DataConfig,
    GymConfig,
    HubConfig,
    ProceduralConfig,
    SourceConfig,
)
from srft_jax.config.errors import RunError, UsageError, show_error
from srft_jax.config.lora import LoraConfig
from srft_jax.config.model import AdaptedModelConfig, ModelConfig, RopeScaling
from srft_jax.config.objective import Aggregation, Objective, ObjectiveConfig
from srft_jax.config.sampling import Truncation
from srft_jax.config.sections import (
    DistributedConfig,
    EvaluationConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    MeshConfig,
    ModelSection,
    PlanConfig,
    ReportConfig,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
    ShapingConfig,
)
from srft_jax.config.training import OptimizerConfig, TrainingConfig

__all__ = [
    "AdaptedModelConfig",
    "Aggregation",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "ExportConfig",
    "GenerateConfig",
    "GymConfig",
    "HubConfig",
    "InspectConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "ModelSection",
    "Objective",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PlanConfig",
    "ProceduralConfig",
    "ReportConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RopeScaling",
    "RunConfig",
    "RunError",
    "ShapingConfig",
    "SourceConfig",
    "TrainingConfig",
    "Truncation",
    "UsageError",
    "Verb",
    "parse",
    "read_yaml",
    "show_error",
    "to_yaml",
]
