"""Files on local disks and on buckets (`gs://bucket/folder`, through `etils.epath`).

New files and folders appear under their names once they are complete. Local ones are written next to their place and
renamed. Objects on a bucket cannot be appended to, mapped into memory, or renamed as a folder: they are made on the
local disk and uploaded whole; libraries that open files themselves get a copy in the cache.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils import epath

from nla_jax.runtime.distributed import barrier, is_writer
from nla_jax.runtime.errors import InputError, first_line

AnyName, AnyPath = str | os.PathLike, Path | epath.Path


def path_to(name: AnyName) -> AnyPath:
    """A `Path`, or for `gs://` one of `epath`. Raises `InputError` for other addresses, or if gcsfs is missing."""
    scheme, separator, rest = os.fspath(name).partition("://")
    if not separator:
        return Path(name)
    if scheme != "gs" or not rest.strip("/"):
        raise InputError(f"{name} is neither a local path nor one on a bucket of Google Cloud (gs://BUCKET/FOLDER).")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{name} is on a bucket, which the package gcsfs reaches; install it: pip install gcsfs.")
    # A listing that this host remembers would hide files that another host has written since.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(os.fspath(name))


def stand_in(name: AnyName) -> Path:
    """A local path for files that are never uploaded: the path itself, or for a place on a bucket one in the cache."""
    if isinstance(path := path_to(name), Path):
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nla_jax" / "buckets"
    return cache / str(path).removeprefix("gs://")


def local(name: AnyName) -> Path:
    """The path itself if it is local; else that of a copy in the cache of the file or folder on the bucket, which is
    fetched again only if it has changed. If there is nothing on the bucket, there is no copy either."""
    if isinstance(path := path_to(name), Path):
        return path
    with reaching(path):
        found = _bucket().find(str(path), detail=True)
        state = sorted((object, info["generation"]) for object, info in found.items())
        version = hashlib.blake2b(repr(state).encode(), digest_size=8).hexdigest()
        copy = stand_in(path).parent / version / path.name
        if found and not copy.exists():
            root = str(path).removeprefix("gs://")
            copy.parent.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=copy.parent.parent) as scratch:
                targets = [f"{scratch}/copy/{path.name}{object.removeprefix(root)}" for object in found]
                for target in targets:
                    Path(target).parent.mkdir(parents=True, exist_ok=True)
                _bucket().get(list(found), targets)
                try:
                    os.rename(f"{scratch}/copy", copy.parent)
                except OSError:
                    if not copy.exists():  # it does if another process of this machine was first
                        raise
    return copy


def upload(source: Path, folder: epath.Path) -> None:
    """Writes all files in the local folder `source` to `folder` on a bucket; each appears when it is complete."""
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    with reaching(folder):
        _bucket().put([str(file) for file in files], [str(folder / file.relative_to(source)) for file in files])


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """A local scratch file that takes the place of `path` when the block ends without an error."""
    if isinstance(path, Path):
        scratch = path.with_name(path.name + ".incomplete")
        yield scratch
        os.replace(scratch, path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder, path.name)
        upload(Path(folder), path.parent)


@contextlib.contextmanager
def new_folder(folder: AnyName) -> Iterator[Path]:
    """A scratch folder that takes the place of `folder` when the block ends without an error.

    Several hosts must all call this, and share one scratch folder. On a bucket each host uploads from a scratch folder
    of its own; if it is killed meanwhile, a part of the new folder stays there."""
    if not isinstance(folder := path_to(folder), Path):
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
            if is_writer() and folder.exists():
                with reaching(folder):
                    folder.rmtree()
            barrier(f"a new {folder.name}")
            upload(Path(scratch), folder)
        barrier(f"{folder.name} in place")
        return
    scratch = folder.with_name(folder.name + ".incomplete")
    if is_writer():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    barrier(f"a new {folder.name}")
    yield scratch
    barrier(f"the end of {folder.name}")
    if is_writer():
        previous = folder.with_name(folder.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)  # at every moment one of the two exists and is whole
        scratch.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    barrier(f"{folder.name} in place")


@contextlib.contextmanager
def reaching(path: AnyPath) -> Iterator[None]:
    """Turns errors of the block about `path`, a place on a bucket, into an `InputError`."""
    try:
        yield
    except Exception as error:  # network, authorisation and gcsfs have no common class of errors
        if isinstance(path, Path) or isinstance(error, InputError):
            raise
        advice = "see that the bucket exists, that you may use it, and that the local disk has room for copies"
        raise InputError(f"{path} cannot be read or written ({first_line(error)}); {advice}.") from None


def _bucket() -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath uses
