"""How a run goes on from its newest checkpoint."""

import time

import jax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from srft_jax.batch import TrainState
from srft_jax.config import ModelConfig, RunConfig, UsageError, to_yaml
from srft_jax.experience.streams import Streams
from srft_jax.mesh import gathered
from srft_jax.report.writers import cut_back
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.loading import load_trained
from srft_jax.training.state import Transformations, abstract_state, fresh_state

# NFS remembers so long that a file was not there, by default; processes have just looked for it.
_SEEN_SECONDS = 60.0


def fresh_or_resumed(
    config: RunConfig,
    model_config: ModelConfig,
    mesh: Mesh,
    transformations: Transformations,
    checkpoints: Checkpoints,
    streams: Streams,
) -> tuple[TrainState, int]:
    """Return the state to start from and its step; move `streams` to where they were then.

    Args:
        config: Where the model is, and how far the run goes.
        model_config: Architecture, with its adapters if any.
        mesh: Devices.
        transformations: Optimizers by name.
        checkpoints: Checkpoints of the run directory.
        streams: Which prompts come next.

    Raises:
        UsageError: the checkpoint is beyond the end of the run, or of another training set.
    """
    start, run_dir = checkpoints.newest(), config.run_dir
    if start is None:
        params = load_trained(config.model, model_config, mesh, config.seed)
        return fresh_state(params, model_config, transformations, mesh), 0
    if start > config.training.num_steps:
        raise UsageError(
            f"{run_dir} has a checkpoint of step {start}, beyond "
            f"training.num_steps = {config.training.num_steps}"
        )
    like = abstract_state(model_config, transformations, mesh)
    state, data_state = checkpoints.restore(start, like)
    streams.restore(data_state, run_dir)
    return state, start


def open_run_dir(config: RunConfig, start: int) -> None:
    """Write config.yaml, and drop records of steps after the checkpoint, which are done again.

    Raises:
        UsageError: some process does not see what process 0 has written there.
    """
    file, text = epath.Path(config.run_dir) / "config.yaml", to_yaml(config)
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        cut_back(config.run_dir, start if start else -1)
        file.write_text(text)
    multihost_utils.sync_global_devices("config.yaml is written")
    sees = gathered(_comes(file, text))
    if not all(sees):
        raise UsageError(
            f"process {sees.index(False)} does not see the {file} of process 0: run_dir must be a "
            "directory that all processes share"
        )


def _comes(file: epath.Path, text: str) -> bool:
    """Whether this process sees the file, in time."""
    latest = time.monotonic() + _SEEN_SECONDS
    while not (file.exists() and file.read_text() == text):
        if time.monotonic() > latest:
            return False
        time.sleep(0.2)
    return True
