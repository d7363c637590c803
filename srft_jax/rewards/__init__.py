"""Verdicts on completions: strings in, floats out, in worker processes.

    verdicts.py                     requests and results of the pool: RewardRequest, RewardResult
    verifiers.py                    the table of kinds; each is a function in answer_kinds.py,
                                    multiple_choice.py, math.py, procedural.py or shaping.py
    user_scorers.py                 a user's own functions as kinds
    extraction.py, quantities.py    finds the answer in a completion; reads numbers
    pool.py                         RewardPool, over the processes of process.py (the parent's
                                    ends), forker.py and worker.py

Nothing here imports JAX.
"""

from srft_jax.rewards.pool import RewardPool
from srft_jax.rewards.verdicts import RewardRequest, RewardResult

__all__ = ["RewardPool", "RewardRequest", "RewardResult"]
