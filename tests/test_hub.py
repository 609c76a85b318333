"""A pair goes to the hub with its model card, and comes back from there: against a hub on this machine."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_hub import TOKEN, serve

from nla_jax.tools.model_card import FIGURES, model_card


@pytest.fixture
def hub(tmp_path):
    """Runs Python or `nla` against an empty hub, in a process of its own: the client reads its settings on import."""
    with serve() as (address, files):
        settings = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "JAX_PLATFORMS": "cpu",
            "NO_PROXY": "127.0.0.1",
        }

        def run(*command: str, token: str = TOKEN) -> subprocess.CompletedProcess:
            environment = os.environ | settings | {"HF_TOKEN": token}
            return subprocess.run(
                [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
            )

        yield run, files


@pytest.fixture
def workdir(pair, tmp_path):
    """The folder of a run with a pair, and what its report says of it."""
    pair.save(tmp_path / "run/pair")
    summary = {"fve_rl": 0.25, "fve_rl_ci95": [0.2, 0.3], "fve_warm": 0.1, "fve_warm_ci95": [0.0, 0.2]}
    summary |= {"heldout_rows": 20, "heldout_documents": 7}
    example = lambda fve, text: {"fve_rl": fve, "context": f"Turn <b>{fve}", "rl": text}
    examples = [example(0.5, "good"), example(0.1, "fair\nindeed"), example(-0.4, "bad")]
    (tmp_path / "run/summary.json").write_text(json.dumps(summary))
    (tmp_path / "run/evaluation.json").write_text(json.dumps({"examples": examples}))
    return tmp_path / "run"


def test_a_pair_goes_to_the_hub_and_comes_back(hub, pair, vectors, workdir, tmp_path):
    run, files = hub
    export = ("-m", "nla_jax.cli", "export", "--pair", str(workdir / "pair"), "--out", str(tmp_path / "out"))
    pushed = run(*export, "--push", "org/pair")
    assert pushed.returncode == 0, pushed.stderr
    assert "Uploaded: http" in pushed.stdout and "org/pair/commit/" in pushed.stdout
    there = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(files["org/pair"]) == there >= {"README.md", "av/model.safetensors", "ar/value_head.safetensors"}
    code = (
        "import sys, numpy as np, nla_jax as nla\n"
        "pair = nla.load_pair('org/pair')\n"
        "np.save(sys.argv[1], pair.reconstruct(['The river turns north.']))"
    )
    again = run("-c", code, str(tmp_path / "recon.npy"))
    assert again.returncode == 0, again.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "recon.npy"), pair.reconstruct(["The river turns north."]))


def test_without_rights_nothing_is_written(hub, workdir, tmp_path):
    run, files = hub
    export = ("-m", "nla_jax.cli", "export", "--pair", str(workdir / "pair"), "--out", str(tmp_path / "out"))
    refused = run(*export, "--push", "org/pair", token="hf_wrong")
    said = [line for line in refused.stderr.splitlines() if line.startswith("nla: ")]
    assert refused.returncode == 1 and len(said) == 1 and "`hf auth login`" in said[0], refused.stderr
    assert not files and not (tmp_path / "out").exists()


def test_a_name_without_owner_is_refused(hub, workdir, tmp_path):
    run, _ = hub
    export = ("-m", "nla_jax.cli", "export", "--pair", str(workdir / "pair"), "--out", str(tmp_path / "out"))
    refused = run(*export, "--push", "pair")
    assert refused.returncode == 1 and "nla: pair is no hub id of the form org/name." in refused.stderr


def test_the_card_has_the_figures_of_the_run(pair, workdir):
    card = model_card("org/pair", pair.sidecar, workdir)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "nla_jax"
    assert f"| {FIGURES['fve_rl']} | 0.250 | 0.200 to 0.300 |" in text and "20 activations of 7 held-out" in text
    assert FIGURES["fve_shuffled"] not in text  # was not measured
    assert text.index("FVE 0.50") < text.index("FVE 0.10") < text.index("FVE -0.40") and "fair indeed" in text
    assert "<b>" not in text and 'nla.load_pair("org/pair")' in text


def test_the_card_of_a_run_that_is_not_evaluated_says_so(pair, workdir, capsys):
    (workdir / "summary.json").unlink()
    assert "Measured" not in model_card("org/pair", pair.sidecar, workdir)
    assert "has no summary.json" in capsys.readouterr().err


def test_the_card_names_a_subject_on_the_hub_alone(pair, subject_folder, tmp_path):
    named = dataclasses.replace(pair.sidecar, base_checkpoint="org/subject")
    assert "base_model: org/subject" in model_card("org/pair", named)
    local = dataclasses.replace(pair.sidecar, base_checkpoint=str(subject_folder))
    assert str(subject_folder) not in model_card("org/pair", local) and "base_model" not in model_card("x/y", local)


def test_a_check_fetches_the_tokenizer_and_no_weights(hub, subject_folder, tmp_path):
    run, files = hub
    files["org/subject"] = {file.name: file.read_bytes() for file in subject_folder.iterdir() if file.is_file()}
    texts = [json.dumps({"text": f"{i}. " + "The river turns. " * 40}) for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    checked = run(
        *("-m", "nla_jax.cli", "check", "--config", "configs/quickstart.py:tiny", "--workdir", str(tmp_path / "run")),
        *("--config.subject.path=org/subject", f"--config.corpus.source={tmp_path / 'texts.jsonl'}"),
        "--config.prompts.max_new_tokens=90",
    )
    assert "AR reads" in checked.stdout, checked.stdout + checked.stderr
    there = {file.name for file in (tmp_path / "hf").rglob("*")}
    assert {"config.json", "tokenizer.json"} <= there and not any("safetensors" in name for name in there)
    whole = run("-c", "from nla_jax.io.hub import locate; print(locate('org/subject'))")
    assert (Path(whole.stdout.strip()) / "model.safetensors").exists(), whole.stderr
