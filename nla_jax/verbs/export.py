"""`nla export`: a pair as plain Hugging Face folders, and a run's datasets in the reference's form."""

import argparse
import shutil
from pathlib import Path

from nla_jax.verbs.conventions import add_conventions, given_conventions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is exported, and where to."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pair", help="folder with av/ and ar/: writes OUT/av and OUT/ar")
    source.add_argument("--workdir", help="a run: writes its pair, and its datasets (of one layer) to OUT/datasets")
    parser.add_argument("--out", required=True, help="a new or empty folder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the weights (default: that of the files)"
    )
    parser.add_argument("--with-subject", action="store_true", help="write the pair's subject to OUT/subject too")
    parser.add_argument("--push", metavar="ORG/NAME", help="also upload OUT, without datasets, to this hub repository")
    parser.add_argument("--private", action="store_true", help="make that repository private if it is new")
    parser.add_argument("--adapters", action="store_true", help="write LoRA adapters as they are (default: merged)")
    add_conventions(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes a trained pair, and where a run is given its datasets."""
    from nla_jax.data.interchange import export_datasets
    from nla_jax.io.files import new_folder, path_to
    from nla_jax.io.hub import push, reserve
    from nla_jax.pair import open_pair
    from nla_jax.runtime.errors import InputError
    from nla_jax.runtime.notes import note
    from nla_jax.tools.claims import file_beside
    from nla_jax.tools.model_card import model_card

    out, folder = empty_folder(arguments.out), path_to(arguments.pair or path_to(arguments.workdir) / "pair")
    if arguments.workdir and not folder.is_dir():
        raise InputError(f"{arguments.workdir} holds no trained pair; run `nla rl` with its config first.")
    pair = open_pair(folder, dtype=arguments.dtype, conventions=given_conventions(arguments))
    workdir = path_to(arguments.workdir) if arguments.workdir else None
    card = model_card(arguments.push or out.name, pair.sidecar, workdir)
    if arguments.push:
        reserve(arguments.push, arguments.private)
    if arguments.adapters and not (pair.verbalizer.lora or pair.reconstructor.lora):
        raise InputError(f"{folder} holds no LoRA adapters, only whole models; leave out --adapters.")
    with new_folder(out) as scratch:
        if workdir and pair.sidecar.earlier_layers:
            note(
                "The datasets are not written: the reference's form holds activations of one layer, these are of several."
            )
        elif workdir:
            export_datasets(workdir, scratch / "datasets", pair.sidecar)
        (pair if arguments.adapters else pair.merged()).save(scratch, arguments.dtype)
        if learned := file_beside(folder):  # how sure one may be of its claims
            (scratch / learned.name).write_text(learned.read_text(encoding="utf-8"), encoding="utf-8")
        if arguments.with_subject:
            copy_subject(pair.sidecar, folder, scratch / "subject")
        (scratch / "README.md").write_text(card, encoding="utf-8")
    if not arguments.with_subject:
        note_subject(pair.sidecar, out)
    print_written(out)
    if arguments.push:
        print(f"Uploaded: {push(out, arguments.push, leave='datasets/*')}")


def copy_subject(sidecar, folder, to: Path) -> None:
    """Copies the subject of the pair in `folder` to where `nla explain` finds it."""
    from nla_jax.io.files import local
    from nla_jax.io.hub import WEIGHTS_TOO
    from nla_jax.io.pairs import find_base

    subject = local(find_base(sidecar.base_checkpoint, folder, sidecar.provenance.get("base_hash")))
    files = [file for pattern in WEIGHTS_TOO for file in subject.glob(pattern)]
    to.mkdir()
    for file in files:
        shutil.copyfile(file, to / file.name)


def note_subject(sidecar, out: Path) -> None:
    """Says that who uses the pair in `out` needs its subject, where that is a folder of this machine."""
    from nla_jax.io.files import path_to
    from nla_jax.runtime.notes import note

    name = sidecar.base_checkpoint
    if path_to(name).is_dir():
        note(f"Whoever uses {out} needs the subject {name} too (--with-subject copies it to {out / 'subject'}).")


def empty_folder(name: str) -> Path:
    """A folder to write to. Raises `InputError` where something is there already, and for one on a bucket."""
    from nla_jax.io.files import path_to
    from nla_jax.runtime.errors import InputError

    if not isinstance(out := path_to(name), Path):
        raise InputError(f"--out {name} is on a bucket; name a local folder, and copy it there (gcloud storage cp -r).")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; give --out another name, or remove it first.")
    return out


def print_written(out: Path) -> None:
    """The folders below `out`, each with its number of files and their size."""
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        sizes = [file.stat().st_size for file in folder.iterdir()]
        print(f"{folder}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB")
