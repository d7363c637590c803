"""Gold answers inside worked solutions, as a source's `answer_from` names them."""

import re
from collections.abc import Callable, Mapping

from srft_jax.rewards.extraction import find_boxes

_WITHOUT_BRACES = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$.]+)")  # MATH has a few


def last_boxed(text: str) -> str | None:
    r"""Return the text in the last box; None without a box.

    In: so \boxed{1}, or rather \boxed{\frac{1}{2}}.  Out: \frac{1}{2}.

    Where no box has braces, TeX's other spelling counts.

    In: $\boxed 5$.  Out: 5.
    """
    boxes = [box.text for box in find_boxes(text)] or _WITHOUT_BRACES.findall(text)
    return boxes[-1].strip() or None if boxes else None


def after_hashes(text: str) -> str | None:
    """Return what follows the last ####, without commas; None without ####.

    In: 48+24 = 72\\n#### 1,072.  Out: 1072.
    """
    _, mark, answer = text.rpartition("####")
    return answer.strip().replace(",", "") or None if mark else None


# answer_from -> function that takes the answer out of a text, and the mark it looks for.
TAKEN_FROM: Mapping[str, tuple[Callable[[str], str | None], str]] = {
    "boxed": (last_boxed, r"\boxed{}"),
    "hashes": (after_hashes, "####"),
}
