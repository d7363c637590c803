"""Which problems may be trained on: their content decides, not the set, its size or its seed."""

import hashlib

HELD_OUT_FRACTION = 1 / 8  # of all problems; the rest may be trained on


def is_held_out(content: str) -> bool:
    """Return whether a problem is for evaluation: the same in every run, on every machine."""
    return unit_hash(content) < HELD_OUT_FRACTION


def belongs(content: str, set_name: str) -> bool:
    """Return whether a problem may stand in this set: `train`, or an evaluation set's name."""
    return is_held_out(content) == (set_name != "train")


def unit_hash(text: str) -> float:
    """Return a number in [0, 1) that looks drawn at random and depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
