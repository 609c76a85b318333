"""Where the parts of a pair lie: the folders of AV and AR, the subject beneath adapters, a tokenizer."""

import contextlib
from pathlib import Path

from nla_jax.io.adapters import read_settings
from nla_jax.io.files import AnyName, AnyPath, is_folder, path_to
from nla_jax.io.hub import fingerprint, locate
from nla_jax.runtime.errors import InputError

ROLES = (("av", "ar"), ("av_lora", "ar_lora"), ("actor", "critic"))  # what makers call the two folders
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these is there where a tokenizer is
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")  # beside it
SHIPPED = Path(__file__).parent.parent / "quickstart/pair"  # which the name "quickstart" means


def place_of(name: AnyName) -> AnyPath:
    """The folder of a pair by its name: a path, or "quickstart" for the pair that comes with the package."""
    return SHIPPED if str(name) == "quickstart" and not path_to(name).exists() else path_to(name)


def pair_folders(av: AnyName, ar: AnyName | None) -> tuple[Path, Path]:
    """The local folders of AV and AR. Where only one name is given, it is that of a folder (or hub id) that holds both,
    or of a run's working folder, or "quickstart".

    Raises `InputError` saying what is there where there is no pair."""
    if ar is not None:
        return locate(av), locate(ar)
    root = place_of(av)
    if not is_folder(root):
        try:
            root = locate(av)
        except InputError as error:
            raise InputError(f"{av} is not a pair: {str(error)[0].lower()}{str(error)[1:]}") from None
    both = lambda folder, names: all((folder / name).is_dir() for name in names)
    for names in ROLES:
        for folder in (root, root / "pair"):
            if both(folder, names):
                return locate(folder / names[0]), locate(folder / names[1])
        if root.name in names and both(root.parent, names):
            raise InputError(f"{av} is not a pair but half of one; name {root.parent}.")
    found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise InputError(f"{av or root} is not a pair: it has no folders `av` and `ar`, but {found}; name AV and AR apart.")


def find_base(recorded: str, beside: AnyPath, base_hash: str | None = None) -> str | AnyPath:
    """The subject that a pair was made from: the folder `recorded`, or `subject` beside the pair's folder, whichever
    has the hash that is recorded; else the hub id.

    Raises `InputError` where there is none of them."""
    places = [recorded] * path_to(recorded).is_dir()
    places += [folder / "subject" for folder in (beside.parent, beside) if (folder / "subject").is_dir()]
    for place in places if base_hash else []:
        with contextlib.suppress(InputError):
            if fingerprint(place) == base_hash:
                return place
    if places:
        return places[0]
    if recorded.count("/") == 1 and not recorded.startswith((".", "/")):
        return recorded
    raise InputError(
        f"The subject {recorded} that {beside} was made from is not here; name its folder or hub id (`nla`: --subject)."
    )


def base_of(given: AnyName | None, adapters: list[Path]) -> AnyName | None:
    """The folder or hub id of the adapters' base model. Raises `InputError` where two name different ones."""
    names = {read_settings(folder).get("base_model_name_or_path") for folder in adapters}
    if not adapters:
        return None
    if given is None and (len(names) > 1 or not isinstance(min(names, key=str), str)):
        raise InputError(f"The adapters {adapters[0]} and {adapters[-1]} name the base models {names}; pass `base`.")
    return given or find_base(names.pop(), adapters[0].parent)


def with_tokenizer(*folders: Path | None) -> Path:
    """The first of the folders that holds a tokenizer; else the first of them."""
    return next((folder for folder in folders if folder and has_tokenizer(folder)), folders[0])


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in TOKENIZER)


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tokenizer, file by file."""
    content = lambda file: file.read_bytes() if file.is_file() else None
    return all(content(one / name) == content(other / name) for name in (*TOKENIZER, *SETTINGS))


def taken(folder: AnyPath, overwrite: bool) -> str:
    """Why a pair cannot be saved in `folder`; "" where it can."""
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file; a pair is saved as a folder with `av` and `ar`."
    for path in (folder / "av", folder / "ar"):
        if not overwrite and path.exists() and not (path.is_dir() and not any(path.iterdir())):
            return f"{path} exists and is not empty; save under another name, or pass overwrite=True to replace it."
    return ""
