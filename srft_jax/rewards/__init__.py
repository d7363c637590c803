"""Verdicts on completions: strings in, floats out, in worker processes. It knows no JAX.

verdicts.py                       what is asked and answered: RewardRequest, RewardResult
verifiers.py                      the table of kinds, each a function in answer_kinds.py,
                                  choices.py, math.py, procedural.py or shaping.py
user_scorers.py                   a user's own functions as kinds
extraction.py, quantities.py      finding the answer in a completion; reading numbers
pool.py                           RewardPool, over the processes of process.py (the parent's
                                  ends), forker.py and worker.py
"""

from srft_jax.rewards.pool import RewardPool
from srft_jax.rewards.verdicts import RewardRequest, RewardResult

__all__ = ["RewardPool", "RewardRequest", "RewardResult"]
