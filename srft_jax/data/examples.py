"""What one row of data is, whatever it was read from."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem.

    Args:
        prompt: Text of the user turn.
        answer: Gold answer that completions and demonstrations are verified against.
        demonstrations: Completions written by somebody else, thinking included; often none.
        kind: The verifier, a key of the table in rewards/.
    """

    prompt: str
    answer: str
    demonstrations: tuple[str, ...] = ()
    kind: str = "final_answer"


@dataclasses.dataclass(frozen=True)
class ExampleSets:
    """The sets of a run; no prompt stands in two of them. `held_out` and `ood` may be empty."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    ood: tuple[Example, ...]
