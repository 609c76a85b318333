"""Files on local disks and on buckets (`gs://bucket/folder`, through `etils.epath`).

New files and folders appear under their names once they are complete. Local ones are written next to their place and
renamed. Objects on a bucket cannot be appended to, mapped into memory, or renamed as a folder: they are made on the
local disk and uploaded whole; libraries that open files themselves get a copy in the cache.
"""

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils import epath

from nla_jax.runtime.distributed import barrier, is_writer
from nla_jax.runtime.errors import InputError, first_line

AnyName, AnyPath = str | os.PathLike, Path | epath.Path
REACH_SECONDS = 60  # for the first answer of a bucket, with all the attempts that gcsfs makes


def path_to(name: AnyName) -> AnyPath:
    """The path of that name: a `Path`, or one of `epath` for `gs://`.

    Raises `InputError` for what is no name, for another kind of address, if the package that reaches buckets is not
    installed, and if the bucket does not answer."""
    if not isinstance(name, (str, os.PathLike)) or "\0" in str(name):
        raise InputError(f"Files and folders are named by texts and paths; found {name!r:.60}.")
    scheme, separator, rest = os.fspath(name).partition("://")
    if not separator:
        return Path(name)
    if scheme != "gs" or not rest.strip("/"):
        raise InputError(f"{name} is neither a local path nor one on a bucket of Google Cloud (gs://BUCKET/FOLDER).")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{name} is on a bucket, which the package gcsfs reaches; install it: pip install gcsfs.")
    _reach(rest.partition("/")[0])
    return epath.Path(os.fspath(name))


def is_folder(path: AnyPath) -> bool:
    """Whether there is such a folder. Raises `InputError` where that cannot be known: for a name that is too long, or
    one in a folder that one may not look into."""
    if not isinstance(path, Path):
        return path.is_dir()
    try:
        return stat.S_ISDIR(path.stat().st_mode)  # `is_dir` hides what is wrong from Python 3.14 on
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InputError(f"{str(path):.80} cannot be looked at ({error.strerror}).") from None


def cache_folder() -> Path:
    """Where this package keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nla_jax"


def stand_in(name: AnyName) -> Path:
    """A local path that is never uploaded: the path itself, or for a place on a bucket one in the cache."""
    if isinstance(path := path_to(name), Path):
        return path
    return cache_folder() / "buckets" / str(path).removeprefix("gs://")


def local(name: AnyName) -> Path:
    """The path itself if it is local; else a copy of the file or folder in the cache, in the version that is on the
    bucket (a version is fetched once). If there is nothing on the bucket, the copy does not exist either."""
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
                targets = [Path(f"{scratch}/copy/{path.name}{object.removeprefix(root)}") for object in found]
                for target in targets:
                    target.parent.mkdir(parents=True, exist_ok=True)
                _bucket().get(list(found), [str(target) for target in targets])
                with contextlib.suppress(OSError):  # another process of this machine was first
                    os.rename(f"{scratch}/copy", copy.parent)
    return copy


def upload(source: Path, folder: epath.Path) -> None:
    """Writes all files in the local folder `source` to `folder` on a bucket; each appears when it is complete."""
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    with reaching(folder):
        _bucket().put([str(file) for file in files], [str(folder / file.relative_to(source)) for file in files])


def sealed(text: str) -> str:
    """A YAML text with a last line that holds a checksum of the others."""
    return f"{text}checksum: {zlib.crc32(text.encode()):08x}\n"


def fits_seal(content: bytes) -> bool | None:
    """Whether a file's content fits the checksum in its last line; None where it has none."""
    found = re.fullmatch(rb"(.*^)checksum: (\w{8})\n", content, re.DOTALL | re.MULTILINE)
    return found and found[2] == f"{zlib.crc32(found[1]):08x}".encode()


def checksum(file: Path) -> str:
    """A CRC-32 of a file's bytes, by which damage is noticed; it reads several GB a second."""
    value = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


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
    """Raises `InputError` if the block fails in what it does with `path` on a bucket."""
    try:
        yield
    except Exception as error:  # network, authorisation and gcsfs have no common class of errors
        if isinstance(path, Path) or isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} cannot be read or written ({first_line(error)}); check that the bucket exists, that you may use "
            f"it, and that the local disk has room for copies."
        ) from None


@functools.cache
def _reach(bucket: str) -> None:
    """Prepares the use of a bucket, and asks it for an object that it does not have."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it would print traces of what a user gets as a sentence
    # Listings that one host remembers would hide what another has written since.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    with reaching(epath.Path(f"gs://{bucket}")):
        try:
            _bucket().exists(f"{bucket}/nla_jax", timeout=REACH_SECONDS)
        except TimeoutError:
            raise TimeoutError(f"no answer within {REACH_SECONDS} s") from None


def _bucket() -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath uses
