"""The configs of released settings: their values, that their meshes divide and hold their models, and that they run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from runpy import run_path

import flax.linen as nn
import jax
import pytest
from conftest import one_sentence, random_params

from nla_jax.cli import load_config, main
from nla_jax.data.rows import load_rows
from nla_jax.io.folders import model_config, save_model
from nla_jax.io.safetensors import check_bytes
from nla_jax.models.sharding import AXES, device_mesh
from nla_jax.models.transformer import abstract_params
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import read_metrics
from nla_jax.stages.check import check_functions
from nla_jax.tools.plan import programs_of
from nla_jax.tools.topology import CHIPS

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
# Published: parameters of the text model in 1e9, K, blocks, width, marker, injection scale, RL learning rate, and
# samples of a step.
RELEASED = {
    "qwen2_5_7b": (7.62, 20, 28, 3584, "㈎", 150, 1.41e-5, 128 * 8),
    "gemma3_12b": (11.77, 32, 48, 3840, "㈜", 80000, 1e-5, 128 * 8),
    "gemma3_27b": (27.01, 41, 62, 5376, "㈜", 60000, 1.41e-5, 256 * 8),
    "llama3_3_70b": (70.55, 53, 80, 8192, "㎡", 30, 5e-6, 128 * 8),
    "qwen3_8b": (8.19, 24, 36, 4096, "", 0, 1.41e-5, 256 * 8),
    "qwen2_5_0_5b": (0.494, 16, 24, 896, "", 0, 1.41e-5, 16 * 8),
}
VARIANTS = {
    "qwen2_5_7b": ["v5e_32", "v6e_16", "v5p_16"],
    "gemma3_12b": ["v5p_16"],
    "gemma3_27b": ["v5p_64"],
    "llama3_3_70b": ["v5p_128"],
    "qwen3_8b": ["v5p_8"],
    "qwen2_5_0_5b": ["v5e_4"],
}


def config(name: str, variant: str = ""):
    return load_config(f"{CONFIGS / name}.py" + (f":{variant}" if variant else ""), [])


@pytest.mark.parametrize("name", RELEASED)
def test_published_values(name):
    c = config(name)
    model = model_config(c.subject.architecture, name)
    billions = sum(x.size for x in jax.tree.leaves(nn.unbox(abstract_params(model)))) / 1e9
    parameters, *expected = RELEASED[name]
    assert billions == pytest.approx(parameters, rel=2e-3)
    assert [
        c.subject.layer,
        model.layers,
        model.width,
        c.prompts.marker,
        c.prompts.injection_scale,
        c.rl.ar_optimizer["lr"],
        c.rl.activations * c.rl.group,
    ] == expected
    assert (c.rl.kl_coefficient, c.prompts.max_new_tokens, c.sft.ar.batch) == (0.01, 150, 256)
    assert c.sft.ar.optimizer == {
        "function": "nla_jax.objective:adamw",
        "lr": 2e-5,
        "final_lr": 2e-6,
        "warmup": 50,
    }


class Device:
    """One chip of hosts with four each."""

    platform = device_kind = "none"

    def __init__(self, id: int):
        self.id, self.process_index = id, id // 4


@pytest.mark.parametrize("name, variant", [(name, v) for name, all in VARIANTS.items() for v in all])
def test_a_variants_mesh_divides_and_holds_the_model(name, variant):
    """From shapes alone; that the compiled programs fit too is in docs/scaling.md."""
    c, (chip, devices) = config(name, variant), variant.split("_")
    mesh = device_mesh([getattr(c.mesh, axis) for axis in AXES], [Device(i) for i in range(int(devices))])
    for name, (program, _) in programs_of(c, mesh).items():
        assert program.least_memory < 0.9 * CHIPS[chip].memory, name
    rows = c.rl.activations * c.rl.group // c.rl.micro_batches
    assert rows % mesh.size == 0 and c.rl.activations % c.rl.micro_batches == 0


def test_an_unknown_variant_gets_one_sentence(capsys):
    assert main(["plan", "--config", f"{CONFIGS / 'gemma3_27b.py'}:v9x_3"]) == 1
    err = capsys.readouterr().err
    assert "no variant 'v9x_3'; there are v5p_64 and tiny" in err and err.count("\n") == 1


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in RELEASED if name != "gemma3_27b"]


@pytest.mark.whole_run
@pytest.mark.parametrize("name", ["gemma3_27b", *SLOW])
def test_the_tiny_variant_trains(name, tokenizer, tmp_path):
    """From text to a joint step, on a random subject of the config's family."""
    c = config(name, "tiny")
    model = model_config(c.subject.architecture, name)
    save_model(tmp_path / "subject", random_params(model), model, tokenizer)
    texts = [(id, text[:1500]) for id, text in sorted(topics.items()) if len(text) > 800][:40]
    (tmp_path / "topics.jsonl").write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in texts))
    workdir = tmp_path / "run"
    flags = [
        "--config",
        f"{CONFIGS / name}.py:tiny",
        "--workdir",
        str(workdir),
        f"--config.subject.path={tmp_path / 'subject'}",
        f"--config.corpus.source={tmp_path / 'topics.jsonl'}",
        "--config.rl.heldout_every=9",
        "--config.rl.steps=2",
    ]
    for verb in ("extract", "label", "sft", "rl"):
        assert main([verb, *flags]) == 0
    steps = read_metrics(workdir / "train/rl/metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2] and all(0 < step["mse"] < 4 for step in steps)
    assert (workdir / "pair/av/adapter_config.json").is_file() == (name == "qwen3_8b")


@pytest.mark.slow
@pytest.mark.whole_run
def test_the_tiny_quickstart_extracts_and_its_controls_differ(tmp_path):
    assert main(["quickstart", "--config", f"{CONFIGS / 'quickstart.py'}:tiny", "--workdir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["extraction_rate"] > 0.9
    controls = [found[f"fve_{name}"] for name in ("shuffled", "no_injection", "empty")]
    assert min(found["fve_rl"], found["fve_warm"]) > max(controls) + 0.05, found
    said = json.loads((tmp_path / "stages/report.json").read_text())["result"]["warnings"]
    assert not [
        sentence for sentence in said if "No control scores lower" in sentence or "hold an explanation" in sentence
    ]


@pytest.mark.slow
@pytest.mark.whole_run
def test_the_smollm2_study_runs_on_documents_and_chats(subject_folder, tmp_path):
    """From its corpus to its report, on a random subject; every activation of a chat is where somebody speaks."""
    texts = [(id, text[:1200]) for id, text in sorted(topics.items()) if len(text) > 800][:40]
    entries = [{"id": id, "text": text} for id, text in texts[:20]]
    for id, text in texts[20:]:
        turns = [{"role": "user", "content": text[:90]}, {"role": "assistant", "content": text[90:300]}]
        entries.append({"id": id, "messages": turns})
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    flags = [
        "--config",
        f"{CONFIGS / 'smollm2_135m.py'}:tiny",
        "--workdir",
        str(tmp_path / "run"),
        f"--config.subject.path={subject_folder}",
        f"--config.label.settings.subject={subject_folder}",
        f"--config.corpus.source={tmp_path / 'corpus.jsonl'}",
        "--config.prompts.max_new_tokens=200",  # this tokenizer spells words out
    ]
    assert main(["quickstart", *flags]) == 0
    rows = load_rows(tmp_path / "run", "av_sft")
    roles, labels = rows.column("role"), rows.column("api_explanation")
    assert {"", "user", "assistant"} == set(roles)
    assert [label.startswith("A user speaks. ") for label in labels] == [role == "user" for role in roles]


@pytest.mark.parametrize(
    "name, value",
    [
        ("rl.heldout_every", 0),
        ("rl.checkpoint_every", -1),
        ("watchdog.stall_minutes", 0.0),
        ("checkpoints.keep", 0),
        ("rl.temperature", 0.0),
        ("evaluate.rows", 1),
    ],
)
def test_numbers_that_mean_nothing_are_refused_before_anything_runs(name, value):
    with pytest.raises(InputError, match=f"{name} is {value}; it must be at least"):
        load_config(f"{CONFIGS / 'quickstart.py'}", [f"--config.{name}={value}"])


@pytest.mark.parametrize(
    "name, value",
    [
        ("rl.kl_coefficient", "nan"),
        ("rl.kl_coefficient", "1e999"),
        ("rl.kl_coefficient", "1" + "0" * 400),
        ("rl.av_optimizer.lr", "1e999"),
        ("rl.av_optimizer.final_lr", "1" + "0" * 400),
    ],
)
def test_numbers_that_no_float_holds_are_refused_before_anything_runs(name, value):
    with pytest.raises(InputError, match=f"{name} is .*, expected a finite number") as error:
        load_config(f"{CONFIGS / 'quickstart.py'}", [f"--config.{name}={value}"])
    one_sentence(error)


def test_optimizers_take_settings_that_the_config_leaves_out():
    """They are an open mapping; everything else has a fixed set of names."""
    c = load_config(f"{CONFIGS / 'quickstart.py'}", ["--config.rl.av_optimizer.final_lr=1e-5"])
    assert c.rl.av_optimizer["final_lr"] == 1e-5 and "final_lr" not in c.rl.ar_optimizer
    with pytest.raises(InputError, match="there is no setting .*top_k"):
        load_config(f"{CONFIGS / 'quickstart.py'}", ["--config.rl.top_k=5"])


@pytest.mark.parametrize("variant", ["truth", *sorted(run_path(str(CONFIGS / "quickstart.py"))["LEVERS"])])
def test_every_lever_is_a_study_that_differs_from_the_quickstart(variant):
    c, quickstart = config("quickstart", variant), config("quickstart")
    check_functions(c, ["label", "sft", "rl"])
    objective = lambda config: (config.rl.reward, config.rl.reader, config.sft.reader)
    assert objective(c) != objective(quickstart)


def test_stories_are_the_quickstart_with_longer_texts(tokenizer):
    c, quickstart = config("stories260k"), config("quickstart")
    assert (
        c.to_dict().keys() == quickstart.to_dict().keys()
        and c.prompts.max_new_tokens > quickstart.prompts.max_new_tokens
    )
    with pytest.raises(InputError, match="has no variants"):
        config("stories260k", "tiny")


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--config.rl.micro_batches=5", r"is 5, which does not divide the rl.activations of a step \(48\)"),
        ("--config.rl.rollout_chunks=7", r"is 7, which does not divide the rl.activations of a step \(48\)"),
        ("--config.rl.rollout_chunks=0", "is 0; it must be at least 1"),
    ],
)
def test_parts_that_do_not_divide_a_step_are_refused_before_anything_runs(flag, said):
    with pytest.raises(InputError, match=rf"rl\.\w+ {said}"):
        load_config(f"{CONFIGS / 'quickstart.py'}", [flag])


@pytest.mark.parametrize("variant", ["", "qwen2_5_7b", "smollm2"])
def test_the_benchmarks_shapes_are_whole_studies(variant):
    """Every program of each variant can be laid out on one device."""
    c, mesh = config("benchmark", variant), device_mesh((1, 1, 1), jax.devices()[:1])
    programs = programs_of(c, mesh)
    assert {"rollout", "joint_step"} < programs.keys()
    with pytest.raises(InputError, match="no variant 'none'"):
        config("benchmark", "none")


def test_the_shipped_pair_carries_checksums():
    assert check_bytes(*(ROOT / "nla_jax/quickstart/pair" / role for role in ("av", "ar"))) == (3, 0)


def test_an_installed_package_has_its_configs_subject_and_pair(tmp_path):
    """What a wheel holds, used from a folder that is no checkout."""
    build = ["-q", "build", "--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path / "lib")]
    subprocess.run([sys.executable, "setup.py", *build], cwd=ROOT, check=True, capture_output=True)
    for folder in ("nla_jax", "configs"):  # every module, and each file of settings
        names = {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*.py")}
        place = tmp_path / "lib/nla_jax" / ("configs" if folder == "configs" else "")
        assert names <= {str(path.relative_to(place)) for path in place.rglob("*.py")}
    subject = ROOT / "nla_jax/quickstart/subject"
    assert sorted(os.listdir(tmp_path / "lib/nla_jax/quickstart/subject")) == sorted(os.listdir(subject))
    pair, there = ROOT / "nla_jax/quickstart/pair", tmp_path / "lib/nla_jax/quickstart/pair"
    assert all((there / file.relative_to(pair)).is_file() for file in pair.rglob("*") if file.is_file())
    elsewhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path / "lib")}, "text": True}
    command = "from nla_jax.cli import load_config as load; print(load('configs/quickstart.py:tiny', []).rl.steps)"
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, **elsewhere)
    assert int(found.stdout) > 0, found.stderr
