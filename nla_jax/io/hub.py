"""Finding a model folder (here, on a bucket, on the Hugging Face hub) and recording which one it was."""

import hashlib
from pathlib import Path

from nla_jax.io.adapters import CONFIG, WEIGHTS
from nla_jax.io.files import AnyName, local, path_to
from nla_jax.io.safetensors import stored_tensors
from nla_jax.runtime.distributed import from_writer
from nla_jax.runtime.errors import InputError, first_line

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.yaml"]  # files that are fetched from the hub


def locate(name: AnyName) -> Path:
    """The local folder of a model: a folder as given, a copy of one on a bucket, or a hub id (`org/name`,
    `org/name@revision`) fetched once. Raises `InputError` if there is no such model."""
    if path_to(name).is_dir():
        return local(name)
    repo, _, revision = str(name).partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise InputError(f"There is no model folder {name}, and it is not a hub id of the form org/name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=PATTERNS))
    except Exception as error:  # network, authorisation, unknown repository
        raise InputError(f"{name} is neither a folder nor a model that the hub gives ({first_line(error)}).") from None


def fingerprint(folder: AnyName) -> str:
    """A hash of the weights and config of a checkpoint (or a PEFT adapter), to record what a run was based on. Of
    several hosts, which must all call this, only the first one reads the files."""
    return from_writer(lambda: _hash(local(folder)))


def _hash(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    files = [folder / CONFIG, folder / WEIGHTS]
    if not files[0].is_file():
        files = [folder / "config.json", *sorted({tensor.file for tensor in stored_tensors(folder).values()})]
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
