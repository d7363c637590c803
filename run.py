"""python run.py [train|evaluate|generate|export|report] --config configs/NAME.yaml [--section.key
VALUE ...]"""

import sys
from collections.abc import Sequence

from srft_jax.config import UsageError, parse


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, 2 for a user's mistake, 130 for a run that was stopped and saved."""
    try:
        verb, config = parse(argv)
        from srft_jax.tasks import VERBS  # after parsing: --help need not load jax

        return VERBS[verb](config)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
