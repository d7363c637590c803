"""Checkpoints by Orbax: train state and data position, written while training goes on."""

from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from srft_jax.batch import TrainState
from srft_jax.config import UsageError
from srft_jax.config.paths import absolute
from srft_jax.models.decoder import Params


class Checkpoints:
    """The checkpoints of one run directory, by step; leaving the context waits for the last save.

    All processes call every method. A process that leaves by an error does not wait: the other ones
    may never come.

    Args:
        run_dir: Directory of the run.
        keep: How many of the newest checkpoints are kept when one is saved; None keeps all.
        read_only: Nothing is saved; else checkpoints/ is made if need be.
    """

    def __init__(self, run_dir: str, keep: int | None = None, *, read_only: bool = False) -> None:
        path = absolute(run_dir) / "checkpoints"
        if not read_only:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:  # a file in the way, or no permission
                raise UsageError(f"{path} cannot be made: {error.strerror or error}") from error
        # A manager that saves nothing writes nothing; Orbax's `read_only` would warn of itself.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
        # A kill in the middle of the first save leaves half a checkpoint, which is as good as none.
        entries = path.iterdir() if path.exists() else ()  # no empty directory on an object store
        names = sorted(entry.name for entry in entries if not ocp.utils.is_tmp_checkpoint(entry))
        self._manager = ocp.CheckpointManager(path, options=options)
        self._path = path
        if names and self._manager.latest_step() is None:
            raise UsageError(
                f"{path} holds no checkpoint, but {len(names)} other things ({names[0]}, ...)"
            )

    def newest(self) -> int | None:
        """Return the latest step saved, None in a fresh run directory."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Copy the state off the devices, and write it and the data position in the background."""
        items = dict(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state))
        self._manager.save(step, args=ocp.args.Composite(**items))

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return the state and the data position of a step; `like` has the state's shapes and
        shardings."""
        self._check_items(step)
        items = dict(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return restored["state"], restored["data"]

    def restore_params(self, step: int, like: Params) -> Params:
        """Return the trained parameters of a step; nothing else is read.

        `like` has their shapes and shardings; the shardings need not be those of the run.

        Raises:
            UsageError: the checkpoint is of parameters of other names or shapes.
        """
        self._check_items(step)
        self._check_shapes(step, like)
        item = {"params": like}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]["params"]

    def _check_shapes(self, step: int, like: Params) -> None:
        directory = self._path / str(step) / "state"
        stored = ocp.PyTreeCheckpointHandler().metadata(directory).tree["params"]
        stored_shapes, shapes = (
            {jax.tree_util.keystr(k): x.shape for k, x in jax.tree.leaves_with_path(tree)}
            for tree in (stored, like)
        )
        different = [
            f"{name} {stored_shapes.get(name)} instead of {shapes.get(name)}"
            for name in sorted(stored_shapes.keys() | shapes.keys())
            if stored_shapes.get(name) != shapes.get(name)
        ]
        if different:
            raise UsageError(
                f"{directory} is of a model of another shape: {', '.join(different[:4])}"
            )

    def _check_items(self, step: int) -> None:
        missing = [
            name for name in ("state", "data") if not (self._path / str(step) / name).exists()
        ]
        if missing:
            raise UsageError(f"{self._path / str(step)} is no checkpoint: it lacks {missing}")

    def wait(self) -> None:
        """Return once the last save is complete."""
        self._manager.wait_until_finished()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and jax.process_count() > 1:
            return
        self.wait()
        self._manager.close()
