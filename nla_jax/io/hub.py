"""Finding a model folder (here, on a bucket, on the Hugging Face hub) and recording which one it was."""

import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from nla_jax.io.adapters import CONFIG, WEIGHTS
from nla_jax.io.files import AnyName, cache_folder, is_folder, local, path_to, replacing
from nla_jax.io.safetensors import check_bytes, stored_tensors
from nla_jax.runtime.distributed import from_writer, is_writer
from nla_jax.runtime.errors import InputError, first_line

HEADER = 1 << 16  # bytes of a file whose content is looked at on every call
SETTLED_SECONDS = 2.0
WHOLE = "0" * 32  # what is kept of files whose checksums fit
WORDS = ["*.json", "*.jinja", "*.model", "*.txt", "*.yaml"]  # files that are fetched from the hub: tokenizer and config
WEIGHTS_TOO = [*WORDS, "*.safetensors"]


def locate(name: AnyName, weights: bool = True) -> Path:
    """The local folder of a model: a folder as given, a copy of one on a bucket, or a hub id (`org/name`,
    `org/name@revision`) fetched once (`weights` False: without its weights, if it is not here yet). Raises `InputError`
    if there is no such model."""
    if is_folder(path_to(name)):
        return local(name)
    repo, _, revision = str(name).partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise InputError(f"There is no model folder {name}, and it is not a hub id of the form org/name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=WEIGHTS_TOO if weights else WORDS)
        )
    except Exception as error:  # network, authorisation, unknown repository
        raise InputError(f"{name} is not a folder, and cannot be read from the hub ({first_line(error)}).") from None


def reserve(repo: str, private: bool) -> None:
    """Makes the hub repository `org/name` where it is not there yet, so that a lack of rights is known before work
    begins. Raises `InputError` where it cannot be made or written to."""
    from huggingface_hub import create_repo

    if repo.count("/") != 1:
        raise InputError(f"{repo} is no hub id of the form org/name.")
    try:
        create_repo(repo, private=private, exist_ok=True)
    except Exception as error:  # network, authorisation
        raise InputError(
            f"{repo} cannot be made on the hub ({first_line(error)}); log in with `hf auth login`."
        ) from None


def push(folder: Path, repo: str, leave: str) -> str:
    """Uploads a folder, but for files that match `leave`, to the hub repository `repo`; returns the commit's address.

    Raises `InputError` where that fails; what is in the folder is kept."""
    from huggingface_hub import upload_folder

    try:
        done = upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=leave, commit_message="Pair written by nla_jax"
        )
    except Exception as error:  # network, authorisation, a full disk there
        raise InputError(
            f"{folder} is written, but cannot be uploaded to {repo} ({first_line(error)}); `hf upload {repo} {folder}` tries "
            f"it again."
        ) from None
    return str(done.commit_url)


def fingerprint(folder: AnyName) -> str:
    """A hash of the weights and config of a checkpoint (or a PEFT adapter), to record what a run was based on. Of
    several hosts, which must all call this, only the first one reads the files.

    It is kept in the cache under what the disk says of the files: they are read again once one of them has changed."""
    return from_writer(lambda: _known_hash(_hashed_files(local(folder))))


def _hashed_files(folder: Path) -> list[Path]:
    if (folder / CONFIG).is_file():
        return [folder / CONFIG, folder / WEIGHTS]
    return [folder / "config.json", *sorted({tensor.file for tensor in stored_tensors(folder).values()})]


def check_once(*folders: Path) -> None:
    """`check_bytes`, unless the cache knows that nothing about the files has changed since they were found whole. Of
    several hosts the first one looks.

    Raises `InputError` naming a weights file that is damaged."""
    found = [file for folder in folders for pattern in WEIGHTS_TOO for file in sorted(folder.glob(pattern))]
    files = [file for file in found if file.is_file()]
    if files and is_writer():
        _remembered(files, "whole", lambda: "" if check_bytes(*folders)[1] else WHOLE)


def _known_hash(files: list[Path]) -> str:
    """The hash of the files' content, from the cache where nothing about them has changed."""
    return _remembered(files, "fingerprints", lambda: _hash(files))


def _remembered(files: list[Path], kind: str, make: Callable[[], str]) -> str:
    """What `make` finds out about files, 32 characters, from the cache where nothing about them has changed. ("" is not
    kept.)"""
    facts = hashlib.blake2b(digest_size=16)
    for file in files:
        of = file.stat()
        with open(file, "rb") as stream:
            facts.update(repr((str(file.resolve()), of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino)).encode())
            facts.update(stream.read(HEADER))
    kept = cache_folder() / kind / facts.hexdigest()
    with contextlib.suppress(OSError):
        if len(found := kept.read_text()) == len(WHOLE):
            return found
    newest = max(max(file.stat().st_mtime, file.stat().st_ctime) for file in files)
    found = make()
    settled = time.time() - newest > SETTLED_SECONDS  # a file that is written to this very moment may keep its times
    if found and settled:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as scratch:
                scratch.write_text(found)
    return found


def _hash(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
