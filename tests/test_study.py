"""One description of a study: what is planned is what is executed, and a stage reads what it declares."""

import dataclasses
import importlib

import jax
import pytest
from conftest import CONFIG, LOOP, copy_before

from nla_jax.cli import load_config
from nla_jax.config import Config, is_free, settings
from nla_jax.io.folders import load_tokenizer, read_config
from nla_jax.models.sharding import make_mesh
from nla_jax.runtime.run import Run
from nla_jax.stages.table import STAGES
from nla_jax.study import Study


class Recorder:
    """A section of a config that remembers which settings were read of it."""

    def __init__(self, section, seen: set[str], path: str = ""):
        self.__dict__.update(_section=section, _seen=seen, _path=path)

    def __getattr__(self, name: str):
        value = getattr(self._section, name)
        if dataclasses.is_dataclass(value):
            return Recorder(value, self._seen, f"{self._path}{name}.")
        if name == "to_dict":
            if self._path:  # of the whole config it is how a run records its settings
                self._seen |= {f"{self._path}{field.name}" for field in dataclasses.fields(self._section)}
        elif not callable(value):
            self._seen.add(f"{self._path}{name}")
        return value

    @property
    def __class__(self) -> type:  # for whoever asks what it is
        return type(self._section)

    def __repr__(self) -> str:
        self.to_dict()
        return repr(self._section)


@pytest.fixture
def config(corpus) -> Config:
    return load_config(CONFIG, [f"--config.corpus.source={corpus}"])


@pytest.mark.parametrize("stage", LOOP)
def test_a_stage_reads_what_it_declares(stage, config, finished, tmp_path):
    """Each stage runs with a config that records what is read: all of it determines its result, or is free."""
    workdir, seen = copy_before(finished, tmp_path, stage), set()
    run = Run(config, workdir, STAGES)
    basis = set(run.basis(stage))
    run.config = Recorder(config, seen)
    module, _, function = STAGES[stage].run.partition(":")
    getattr(importlib.import_module(module), function)(run)
    undeclared = {name for name in seen if name.split(".")[0] not in basis and not is_free(name)}
    assert not undeclared and seen
    own = {name for name in seen if name.split(".")[0] in STAGES[stage].reads}
    assert own, f"{stage} declares {STAGES[stage].reads} and reads none of it"


def test_every_stage_is_in_the_command_line():
    from nla_jax.cli import VERBS

    assert {name: stage.help for name, stage in STAGES.items()} == {name: VERBS[name][1] for name in STAGES}
    for before, stage in zip(LOOP, LOOP[1:]):
        assert STAGES[stage].needs == before


def test_free_settings_are_those_that_do_not_change_a_result():
    free = {name for name, _ in settings() if is_free(name)}
    assert {"mesh.data", "compute.remat", "rl.micro_batches", "sft.checkpoint_every", "log.texts"} <= free
    assert not free & {"rl.lr", "seed", "rl.group", "compute.dtype", "rl.kl_coefficient", "prompts.max_new_tokens"}


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 4, 1)])
def test_what_is_planned_is_what_is_executed(mesh, config, finished, tmp_path, monkeypatch):
    """Shapes, dtypes and shardings of the arguments of the joint step, in a plan from shapes and in a run."""
    workdir, seen = copy_before(finished, tmp_path, "rl"), []
    tokenizer = load_tokenizer(workdir / "subject")
    assert tokenizer  # its prompts have the lengths that the config's `plan` says
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, data=mesh[0], fsdp=mesh[1], tensor=mesh[2]),
        rl=dataclasses.replace(config.rl, steps=1, activations=8),
    )
    program = Study.joint_program.func

    def recorded(study):
        compiled = program(study)
        return lambda *arguments: seen.append(jax.tree.map(described, arguments)) or compiled(*arguments)

    monkeypatch.setattr(Study, "joint_program", property(recorded))
    from nla_jax.stages.rl import rl

    rl(Run(config, workdir, STAGES))
    monkeypatch.undo()
    model = read_config(workdir / "subject", config.compute.dtype)
    model = dataclasses.replace(model, remat=config.compute.remat)
    planned = Study.of_shapes(config, make_mesh(*mesh), model).programs()["joint_step"].arguments
    expected = jax.tree.map(described, planned)
    assert jax.tree.structure(seen[0]) == jax.tree.structure(expected)
    for (path, run), plan in zip(jax.tree_util.tree_leaves_with_path(seen[0]), jax.tree.leaves(expected)):
        assert run == plan, jax.tree_util.keystr(path)


def test_without_a_kl_term_no_second_verbalizer_is_held(config, finished):
    """In a plan, which is what is executed (above), and where a run makes it."""
    model = read_config(finished / "subject", config.compute.dtype)
    for coefficient, copies in ((0.0, 0), (0.1, 1)):
        changed = dataclasses.replace(config, rl=dataclasses.replace(config.rl, kl_coefficient=coefficient))
        study = Study.of_shapes(changed, make_mesh(1, 1, 1), model)
        state, frozen, _ = study.programs()["joint_step"].arguments
        params = state.models["verbalizer"].params
        size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
        assert size(frozen) == copies * size(params)
        if not copies:
            assert study.frozen(params, None).reference is None


def described(x) -> str:
    """Shape, dtype and layout of an array or of a planned one."""
    return f"{x.dtype}{list(x.shape)} {x.sharding.shard_shape(x.shape)}"
