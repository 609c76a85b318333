"""`python_docs`: a corpus that needs no download, the documentation of Python and of this package's dependencies.

A TFDS dataset of docstrings, read from the installed sources without importing them, of the packages' READMEs and of
Python's language reference (`pydoc` topics): about 6 MB of technical English that every installation already has.
It is written as ArrayRecord and neither written nor read through TensorFlow.
"""

import ast
import email
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path, PurePath

import tensorflow_datasets as tfds
from tqdm import tqdm

Sources = Mapping[str, Mapping[str, Path]]  # distribution -> path inside it -> file

DISTRIBUTIONS = (
    "absl-py",
    "attrs",
    "click",
    "einops",
    "etils",
    "flax",
    "fsspec",
    "huggingface_hub",
    "humanize",
    "jax",
    "jaxlib",
    "jaxtyping",
    "Jinja2",
    "ml_collections",
    "numpy",
    "opt_einsum",
    "optax",
    "orbax-checkpoint",
    "packaging",
    "psutil",
    "pyarrow",
    "Pygments",
    "pytest",
    "PyYAML",
    "requests",
    "rich",
    "safetensors",
    "scipy",
    "tensorflow-datasets",
    "tokenizers",
    "tqdm",
    "transformers",
    "treescope",
    "urllib3",
)
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "dist-packages",
    "_vendor",
    "vendored",
}
MIN_CHARS = 400  # long enough to sample positions well past the first tokens
MAX_CHARS = 4000  # longer documents are cut into parts
MAX_BYTES_PER_DISTRIBUTION = 750_000  # so that no package dominates
MAX_FILE_BYTES = 1_000_000  # larger sources are generated tables
TOPICS = "pydoc_data/topics.py"
README_DECORATION = re.compile(r"^ *(<|\[!\[|!\[|\.\. image|\.\. \|).*\n?", re.MULTILINE)


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """Examples `{"id": "numpy/numpy.linalg.norm", "text": ...}`; the parts of a cut document are `id#1`, `id#2`, ...

    The configuration's name is a fingerprint of the sources: a changed environment gets a new build, and the old one stays.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def __init__(self, *, data_dir: str | Path, sources: Sources | None = None):
        """`sources` is what to read, by default the running Python and the installed `DISTRIBUTIONS`."""
        self.sources = installed_sources() if sources is None else sources
        config = tfds.core.BuilderConfig(name=fingerprint(self.sources), description="One environment's sources.")
        super().__init__(data_dir=data_dir, config=config, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"id": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, description=__doc__, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
        for name, text in documents(self.sources):
            yield name, {"id": name, "text": text}


def installed_sources() -> Sources:
    """The Python files and READMEs of the running Python (as `python`) and of those `DISTRIBUTIONS` it has."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = {"python": [(file.relative_to(stdlib), file) for file in stdlib.rglob("*.py")]}
    for name in DISTRIBUTIONS:
        try:
            files[name] = [(path, Path(path.locate())) for path in metadata.files(name) or ()]
        except metadata.PackageNotFoundError:
            continue
    return {
        name: {path.as_posix(): file for path, file in sorted(found) if is_source(path, file)}
        for name, found in files.items()
    }


def is_source(path: PurePath, file: Path) -> bool:
    """Whether to read `file`, which stands at `path` in its distribution."""
    wanted = path.suffix == ".py" or path.name == "METADATA"
    return wanted and not SKIPPED_FOLDERS.intersection(path.parts) and file.is_file()


def fingerprint(sources: Sources) -> str:
    """A short hash of the sources' names and sizes and of the limits above."""
    digest = hashlib.blake2b(repr((MIN_CHARS, MAX_CHARS, MAX_BYTES_PER_DISTRIBUTION)).encode(), digest_size=6)
    for name in sorted(sources):
        for path, file in sorted(sources[name].items()):
            digest.update(f"{name}/{path}:{file.stat().st_size}\n".encode())
    return digest.hexdigest()


def documents(sources: Sources) -> Iterator[tuple[str, str]]:
    """The corpus as (id, text), in the order of the ids, without duplicates and near-duplicates."""
    files = [(name, path, file) for name in sources for path, file in sources[name].items()]
    found = {}
    for name, path, file in tqdm(files, desc="Reading installed sources", unit=" files", leave=False, disable=None):
        for id, text in file_documents(name, path, file):
            if len(text) >= MIN_CHARS:
                found.setdefault(id, text)  # a property's setter repeats the getter's name
    kept = without_duplicates(sorted(found.items()))
    for id, text in sorted(within_budget(kept)):
        parts = cut(text)
        for number, part in enumerate(parts, 1):
            yield (id if len(parts) == 1 else f"{id}#{number}"), part


def file_documents(name: str, path: str, file: Path) -> Iterator[tuple[str, str]]:
    """The (id, text) in one file: docstrings of a module, `pydoc` topics, or a README."""
    if file.stat().st_size > MAX_FILE_BYTES:
        return
    source = file.read_text(encoding="utf-8", errors="replace")
    if path.endswith("METADATA"):
        yield f"{name}/README", README_DECORATION.sub("", email.message_from_string(source).get_payload()).strip()
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates, sources of another Python version
        return
    if path == TOPICS:
        topics = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
        yield from ((f"{name}/topics.{topic}", text.strip()) for topic, text in topics.items())
        return
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    yield from docstrings(f"{name}/{module}", tree)


def docstrings(id: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """The docstrings of a module, class or function and of the definitions in its body."""
    if text := ast.get_docstring(node):
        yield id, text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings(f"{id}.{child.name}", child)


def without_duplicates(found: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Drops texts seen before, and those most of whose lines of 30 characters or more stood in earlier texts."""
    texts, lines = set(), set()
    for id, text in found:
        normal = " ".join(text.lower().split())
        own = {line for raw in text.splitlines() if len(line := raw.strip()) >= 30}
        if normal not in texts and 2 * len(own & lines) <= len(own):
            texts.add(normal)
            lines |= own
            yield id, text


def within_budget(found: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """A random sample of each distribution, the same on every machine, of at most `MAX_BYTES_PER_DISTRIBUTION`."""
    used = {}
    for id, text in sorted(found, key=lambda document: hashlib.blake2b(document[0].encode()).digest()):
        distribution, size = id.split("/")[0], len(text.encode("utf-8", "replace"))
        if used.get(distribution, 0) + size <= MAX_BYTES_PER_DISTRIBUTION:
            used[distribution] = used.get(distribution, 0) + size
            yield id, text


def cut(text: str) -> list[str]:
    """Parts of at most `MAX_CHARS`, cut at paragraphs where possible, else at lines; a short rest is left out."""
    parts = []
    while len(text) > MAX_CHARS:
        borders = text.rfind("\n\n", MIN_CHARS, MAX_CHARS), text.rfind("\n", MIN_CHARS, MAX_CHARS), MAX_CHARS
        border = next(border for border in borders if border > 0)
        parts.append(text[:border])
        text = text[border:].lstrip("\n")
    return parts + [text] if len(text) >= MIN_CHARS else parts
