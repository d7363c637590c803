"""The reward pool's requests and results."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Verdict = Literal["right", "wrong", "unparsed", "timeout", "crash"]


@dataclasses.dataclass(frozen=True)
class RewardRequest:
    """One completion to verify.

    Args:
        kind: Key of verifiers.KINDS, or `package.module:function` for a user's own scorer.
        completion: Text without special and EOS tokens, but with its think tags.
        gold: The reference answer.
        metadata: Columns of the row, as JSON values: options of a verifier, keyword arguments of a
            user's scorer.
        where: File and row that the request comes from, as messages name them.
    """

    kind: str
    completion: str
    gold: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""


@dataclasses.dataclass(frozen=True)
class RewardResult:
    """The outcome of one request.

    Args:
        reward: A number in [0, 1] from a verifier, any finite number from a user's scorer; 0 if
            there is no verdict in time or the scorer crashes.
        verdict: `right`, `wrong`, `unparsed` (no answer in the completion), `timeout` or `crash`
            (the scorer raised, returned no finite number, or ended its process).
    """

    reward: float
    verdict: Verdict
