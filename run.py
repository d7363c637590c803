"""python run.py [VERB] --config NAME.yaml [--section.key VALUE]; without a verb, it trains."""

import sys
from collections.abc import Sequence

from srft_jax.config import RunError, UsageError, parse, show_error


def main(argv: Sequence[str]) -> int:
    """Exit code: 0; 2 for a user's mistake, 1 for a run that cannot go on, 130 for one stopped."""
    try:
        verb, config = parse(argv)
        from srft_jax.host import libtpu

        libtpu.set_flags()  # before jax is there
        # After parsing, so that --help and a misspelled key need not wait for jax.
        from srft_jax.host import processes
        from srft_jax.host.jax_options import jax_options
        from srft_jax.tasks import evaluate, export, generate, inspect, plan, replay, report, train

        verbs = {
            "train": train.train,
            "evaluate": evaluate.evaluate,
            "generate": generate.generate,
            "export": export.export,
            "report": report.report,
            "inspect": inspect.inspect,
            "replay": replay.replay,
            "plan": plan.plan,
        }
        with (
            processes.joined(verb, config) as config,
            jax_options(config.model.matmul_precision, config.compilation_cache, config.run_dir),
        ):
            return verbs[verb](config)
    except (UsageError, RunError) as error:
        return show_error(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
