"""Buckets of an object store in a local directory, reached as gs:// by all that a run uses.

etils and jsonargparse go through fsspec, whose file system of that name is replaced; TensorStore,
which writes the arrays of checkpoints, is given the directory.
"""

import contextlib
from pathlib import Path
from unittest import mock

from etils import epath
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils


class BucketFileSystem(DirFileSystem):
    """gs://bucket/object is the file root/bucket/object.

    As in a real bucket nothing is appended to, and there are no directories but those of objects:
    making one does nothing, and the last object takes it along.
    """

    protocol = ("gs", "gcs")
    cachable = False
    root = ""  # of the test

    def __init__(self, **_):
        super().__init__(path=self.root, fs=LocalFileSystem(auto_mkdir=True))

    def _join(self, path):
        if isinstance(path, str):
            return super()._join(path.split("://")[-1].rstrip("/"))
        return super()._join(path)

    def open(self, path, mode="rb", **options):
        assert "a" not in mode and "+" not in mode, f"{path} is appended to"
        return super().open(path, mode, **options)

    def mkdir(self, path, *args, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rm(self, path, *args, **options):
        super().rm(path, *args, **options)
        self._prune(path)

    def rename(self, path, target, recursive=False):
        """Object by object."""
        for source in self.find(path):
            self.cp_file(source, source.replace(_bare(path), _bare(target), 1))
            self.rm(source)

    def _prune(self, path):
        for folder in Path(self._join(path)).parents:
            if folder == Path(self.root) or not folder.is_dir() or any(folder.iterdir()):
                return
            folder.rmdir()


def _bare(path):
    return path.split("://")[-1]


@contextlib.contextmanager
def local_buckets(root):
    """Within the block gs:// is below `root`."""

    def in_directory(path):
        bucket, inside = gcs_utils.parse_gcs_path(path)
        file = f"{root}/{bucket}/{inside}"  # ends in a slash, also for the one object that it is
        return {"driver": "file", "path": file.replace("/_sharding/", "/_sharding")}

    backend.fsspec_backend._get_filesystem.cache_clear()
    names = ("gs", "gcs")
    with (
        mock.patch.object(BucketFileSystem, "root", str(root)),
        mock.patch.dict(_registry, dict.fromkeys(names, BucketFileSystem)),
        mock.patch.object(gcs_utils, "get_kvstore_for_gcs", in_directory),
        mock.patch.object(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False),
    ):
        yield epath.Path("gs://bucket")
    backend.fsspec_backend._get_filesystem.cache_clear()
