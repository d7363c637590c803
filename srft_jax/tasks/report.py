"""Verb `report`: the page of a run, from its run directory alone."""

from srft_jax.config import RunConfig
from srft_jax.report.page import write_report


def report(config: RunConfig) -> int:
    """Writes run_dir/report.html."""
    print(f"report   {write_report(config.run_dir)}")
    return 0
