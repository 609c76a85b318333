"""Imports point one way. A module may import its own layer's and lower layers' modules, never a higher one's."""

import ast
from pathlib import Path

import pytest

import nla_jax

ROOT = Path(nla_jax.__file__).parent
LAYERS = [  # lowest first; a name covers the modules beneath it
    ["runtime.errors", "runtime.environment"],
    ["runtime.distributed", "runtime.notes", "runtime.user_code", "config", "fve", "tools.report"],
    ["io.files", "models.sharding", "models.cpu_forms", "models.rope", "models.views"],
    ["runtime.user_input", "io.parquet", "io.safetensors", "models.attention", "runtime.compiler"],
    ["models.kernels", "models.layers"],
    ["models.transformer"],
    ["models.families"],
    ["io.folders", "io.adapters", "models"],
    ["io"],
    ["autoencoder", "objective", "data.batches", "data.activations", "data.chats", "data.corpus", "quickstart"],
    ["losses", "sampling"],
    ["joint_step", "prompts", "runtime.metrics", "runtime.checkpoint"],
    ["io.conventions"],
    ["sidecar", "subject", "runtime.watchdog"],
    ["data", "pair", "patching", "runtime.run"],
    ["labels", "steering", "study"],
    ["probes"],
    ["stages", "tools"],
    ["serve.page", "serve.worker", "serve.claims", "serve.nearest"],
    ["serve.models"],
    ["serve"],
    ["verbs"],
    ["cli"],
]
ALONE = {
    "runtime.errors": set(),
    "models.attention": {"models.cpu_forms"},
    "models.sharding": {"runtime.errors"},
    "runtime.distributed": {"runtime.errors", "runtime.environment"},
    "io.files": {"runtime.errors", "runtime.distributed"},
    "fve": {"runtime.errors"},
    "config": {"runtime.errors"},
}  # what these import of ours at most
READERS = {"ml_collections": {"cli"}, "absl": {"cli", "verbs.stages"}}  # who may know configs and flags
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in sorted(ROOT.rglob("*.py"))}
MODULES = {name: file for name, file in MODULES.items() if not name.endswith("__init__")}


def layer(module: str) -> int:
    """The layer of a module, by the longest name that covers it."""
    covers = [(len(name), i) for i, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert covers, f"nla_jax/{module}.py stands in no layer of this table"
    return max(covers)[1]


def imported(module: str) -> set[str]:
    """Every module (dotted, absolute) that a file imports, at its top or inside a function."""
    names, package = set(), ["nla_jax", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            names |= {name for name in inner if name.removeprefix("nla_jax.") in MODULES} or {source}
    return names


def ours(module: str) -> set[str]:
    names = {name.removeprefix("nla_jax.") for name in imported(module) if name.split(".")[0] == "nla_jax"}
    assert names <= MODULES.keys(), f"nla_jax/{module}.py imports {names - MODULES.keys()}, which is no module of ours"
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    above = {name for name in ours(module) if layer(name) > layer(module)}
    assert not above, f"nla_jax/{module}.py imports {sorted(above)}, of a higher layer"
    assert "cli" not in ours(module), f"nla_jax/{module}.py imports cli"
    more = ours(module) - ALONE.get(module, ours(module))
    assert not more, f"nla_jax/{module}.py must import next to nothing of ours, but imports {sorted(more)}"


@pytest.mark.parametrize("package", READERS)
def test_only_the_command_line_knows_configs_and_flags(package):
    readers = {name for name in MODULES if package in {source.split(".")[0] for source in imported(name)}}
    assert readers == READERS[package]


def test_the_table_lists_only_what_exists():
    for name in sum(LAYERS, []):
        assert any(f"{module}.".startswith(f"{name}.") for module in MODULES), f"there is no nla_jax/{name}"
