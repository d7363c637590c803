from srft_jax.rewards.pool import RewardPool
from srft_jax.rewards.verdicts import RewardRequest, RewardResult

__all__ = ["RewardPool", "RewardRequest", "RewardResult"]
