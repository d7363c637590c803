"""Gold answers that stand inside a worked solution: what a source's `answer_from` takes."""

import re
from collections.abc import Callable, Mapping

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def last_boxed(text: str) -> str | None:
    r"""In: so \boxed{1}, or rather \boxed{\frac{1}{2}}.  Out: \frac{1}{2}; None without a box."""
    starts = [match.end() for match in _BOXED.finditer(text)]
    if not starts:
        return None
    depth = 1
    for position in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[starts[-1] : position].strip() or None
    return None


def after_hashes(text: str) -> str | None:
    """In: 48+24 = 72\\n#### 1,072.  Out: 1072; None without ####."""
    _, mark, answer = text.rpartition("####")
    return answer.strip().replace(",", "") or None if mark else None


# answer_from -> what it takes, and what it is called where there is none.
TAKEN_FROM: Mapping[str, tuple[Callable[[str], str | None], str]] = {
    "boxed": (last_boxed, r"\boxed{}"),
    "hashes": (after_hashes, "####"),
}
