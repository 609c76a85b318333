"""compute.dtype=auto: what devices multiply faster, kept by the run that began with it."""

import json

import jax
import pytest

from nla_jax.cli import load_config, main
from nla_jax.tools import precision

AUTO = "--config.compute.dtype=auto"


@pytest.fixture
def products(monkeypatch):
    """Sets how fast the CPU multiplies in each dtype, and says how often it was asked."""
    asked = []

    def set_to(**speeds: float) -> list:
        monkeypatch.setattr(precision, "measured_peak", lambda dtype: asked.append(dtype) or speeds[dtype])
        return asked

    return set_to


@pytest.mark.parametrize("speed, dtype", [(2.0, "bfloat16"), (1.2, "float32"), (0.8, "float32")])
def test_the_dtype_is_that_of_the_faster_products(products, speed, dtype, capsys):
    products(bfloat16=speed, float32=1.0)
    precision.note.cache_clear()
    for _ in range(2):
        found = precision.settled(load_config("configs/quickstart.py:tiny", [AUTO]))
        assert found.compute.dtype == dtype
    assert capsys.readouterr().err.count(f"this run computes in {dtype}") == 1


def test_a_moment_in_which_others_work_decides_nothing(monkeypatch):
    speeds = iter([0.6, 1.0, 2.0, 0.4, 0.6, 1.0])  # bfloat16 and float32 in turn
    monkeypatch.setattr(precision, "measured_peak", lambda dtype: next(speeds))
    assert precision.fastest() == "bfloat16"


def test_accelerators_compute_in_bfloat16(products, monkeypatch):
    asked = products()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert precision.fastest() == "bfloat16" and not asked


def test_a_dtype_that_is_named_stays(products):
    asked = products()
    config = load_config("configs/quickstart.py:tiny", ["--config.compute.dtype=float16"])
    assert precision.settled(config) is config and not asked


def test_a_run_keeps_the_dtype_that_it_began_with(products, tmp_path):
    """On a machine with slower products too; and its records name that dtype, so that its probes compute in it."""
    asked = products(bfloat16=2.0, float32=1.0)
    flags = ["pretrain", "--config", "configs/quickstart.py:tiny", "--workdir", str(tmp_path / "run"), AUTO]
    flags += [f"--config.corpus.source={tmp_path / 'texts.jsonl'}", "--config.corpus.min_chars=0"]
    texts = [{"id": str(i), "text": f"Number {i} is followed by number {i + 1}, as always. " * 9} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    assert main([*flags, "--config.pretrain.steps=1"]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["compute"]["dtype"] == "bfloat16"
    products(bfloat16=1.0, float32=1.0)
    before = len(asked)
    assert main([*flags, "--config.pretrain.steps=1"]) == 0
    assert len(asked) == before
