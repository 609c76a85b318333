"""Files on local disks and on buckets (`gs://bucket/folder`, through `etils.epath`).

A local file is used where it lies, and a new one is written beside its place and renamed. Objects on a bucket cannot be
appended to, mapped or renamed as a folder: they are made on the local disk and uploaded whole, and what libraries open
themselves is read from a copy in the cache.
"""

import contextlib
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils import epath

from nla_jax.runtime.errors import InputError, first_line

AnyPath = Path | epath.Path


def path_to(name: str | os.PathLike) -> AnyPath:
    """The path of that name: a `Path`, or one of `epath` for `gs://`.

    Raises `InputError` for another kind of address, and where the package that reaches buckets is not installed."""
    scheme, separator, rest = os.fspath(name).partition("://")
    if not separator:
        return Path(name)
    if scheme != "gs" or not rest.strip("/"):
        raise InputError(
            f"{name} is neither a local path nor a place on a bucket of Google Cloud (gs://BUCKET/FOLDER)."
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{name} is on a bucket, which the package gcsfs reaches; install it: pip install gcsfs.")
    # Listings that one host remembers would hide what another has written since.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(os.fspath(name))


def stand_in(name: str | os.PathLike) -> Path:
    """A local path that stands for this one, never uploaded: itself, or for a place on a bucket one in the cache."""
    if isinstance(path := path_to(name), Path):
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nla_jax" / "buckets"
    return cache / str(path).removeprefix("gs://")


def local(name: str | os.PathLike) -> Path:
    """The path itself where it is local; else a copy of the file or folder in the cache, as it now stands on the bucket (what
    is there already is not fetched again). Where there is none, neither is the copy."""
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
                    if not copy.exists():  # it does where another process of this machine was first
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
def reaching(path: AnyPath) -> Iterator[None]:
    """Raises `InputError` where the block cannot do what it does with `path` on a bucket."""
    try:
        yield
    except Exception as error:  # of the network, of authorisation and of gcsfs, without a common class
        if isinstance(path, Path) or isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} cannot be read or written ({first_line(error)}); see that the bucket exists, that you may use it, and that "
            f"the local disk has room for copies."
        ) from None


def _bucket() -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath uses
