"""Working folders on a bucket: gcsfs, Orbax and tensorstore speak to a Google Cloud Storage of this process
(fake_gcs.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import history, nla_main, one_line, one_sentence, same_run, weights
from fake_gcs import Store, serving

import nla_jax.study
from nla_jax.cli import main
from nla_jax.data.rows import load_rows
from nla_jax.io.files import local, path_to, replacing, stand_in
from nla_jax.labels.cache import Cache
from nla_jax.labels.labeller import NoLabel
from nla_jax.pair import load_pair
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import MetricLog, read_metrics, write_atomically


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The objects of `gs://bucket`."""
    store = Store()
    with serving(store) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # would ask another service for the bucket's kind
        import gcsfs  # noqa: F401 (after the switch above, which it reads when it is imported)

        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield store


def test_a_local_path_is_itself(tmp_path):
    for name in ("runs/a", tmp_path, tmp_path / "missing"):
        assert path_to(name) == local(name) == stand_in(name) == Path(name)
        assert type(path_to(name)) is type(Path(name))


@pytest.mark.parametrize("name", ["s3://bucket/run", "gs://", "https://example.org/run"])
def test_other_addresses_are_refused(name):
    with pytest.raises(InputError, match="neither a local path nor") as error:
        path_to(name)
    one_sentence(error)


def test_a_bucket_without_its_package(monkeypatch, capsys, corpus):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert nla_main("extract", "gs://bucket/run", corpus) == 1
    assert "pip install gcsfs" in one_line(capsys)
    assert not Path("gs:").exists()


def test_a_bucket_that_is_not_there(store, capsys, corpus):
    assert nla_main("extract", "gs://elsewhere/run", corpus) == 1
    assert "gs://elsewhere/run cannot be read or written" in one_line(capsys)


def test_files_come_and_go_whole(store):
    folder = path_to("gs://bucket/files")
    large = np.random.default_rng(0).bytes(6 << 20)  # more than one request may carry
    with replacing(folder / "sub/large") as scratch:
        scratch.write_bytes(large)
    store.put("files/", b"")  # as people make folders in a browser
    write_atomically(folder / "small", "one")
    copy = local(folder)
    assert (copy / "sub/large").read_bytes() == large and (copy / "small").read_text() == "one"
    assert local(folder / "small").read_text() == "one"

    before = len(store.puts)
    with pytest.raises(KeyboardInterrupt), replacing(folder / "small") as scratch:
        scratch.write_text("a part")
        raise KeyboardInterrupt
    assert len(store.puts) == before and local(folder) == copy  # unchanged, not fetched again
    write_atomically(folder / "small", "two")  # of the same size, in the same second
    assert (local(folder) / "small").read_text() == local(folder / "small").read_text() == "two"
    assert not local(folder / "missing").exists()


def test_metrics_reach_the_bucket_before_each_checkpoint(store, tmp_path):
    logs = {name: MetricLog(path_to(name)) for name in ("gs://bucket/metrics", tmp_path / "metrics")}
    for step in range(1, 6):
        for log in logs.values():
            log.write(step, {"loss": 1 / step})
    on_bucket, on_disk = logs.values()
    assert len(read_metrics(on_bucket.path)) < 5  # one upload a minute
    on_bucket.flush()
    assert on_bucket.path.read_text() == on_disk.path.read_text()
    again = MetricLog(path_to("gs://bucket/metrics"), 3)  # a process that was killed after step 5, and resumes
    assert [record["step"] for record in again.records] == [1, 2, 3]
    again.write(4, {"loss": 0.0})
    again.close()
    assert [record["step"] for record in read_metrics(again.path)] == [1, 2, 3, 4]
    assert any(name.startswith("metrics/tensorboard/events") for name in store.objects)


def test_answers_of_labellers_reach_the_bucket(store, monkeypatch):
    """All of them when the cache is closed, and before that once a minute."""
    folder = path_to("gs://bucket/labelled/cache")
    cache = Cache(folder)
    cache.add({"a": "One", "b": NoLabel("cut")})
    assert not Cache(folder).answers
    monkeypatch.setattr("nla_jax.labels.cache.UPLOAD_SECONDS", 0)
    cache.add({"c": "Three"})
    assert Cache(folder).answers == {"a": "One", "b": NoLabel("cut"), "c": "Three"}
    cache.add({"d": "Four"})
    cache.close()
    second = Cache(folder)
    second.add({"e": "Five"})
    second.close()
    assert Cache(folder).answers.keys() == set("abcde")
    assert sorted(file.name for file in folder.glob("*.jsonl")) == ["00000-00000.jsonl", "00000-00001.jsonl"]


def test_a_pair_is_saved_and_loaded(store, pair, vectors, tmp_path):
    store.put("pair/av/model-00001-of-00009.safetensors", b"of an earlier pair")
    with pytest.raises(InputError, match="gs://bucket/pair/av exists and is not empty"):
        pair.save("gs://bucket/pair")
    pair.save("gs://bucket/pair", overwrite=True)
    pair.save(tmp_path / "pair")
    there = {name.removeprefix("pair/") for name in store.objects if name.startswith("pair/")}
    assert there == {str(file.relative_to(tmp_path / "pair")) for file in (tmp_path / "pair").rglob("*.*")}
    for file in ("av/model.safetensors", "ar/model.safetensors", "ar/value_head.safetensors"):
        assert store.objects[f"pair/{file}"][0] == (tmp_path / "pair" / file).read_bytes()
    again = load_pair("gs://bucket/pair")
    assert np.array_equal(again.reconstruct(["some text"]), load_pair(tmp_path / "pair").reconstruct(["some text"]))


@pytest.mark.slow
def test_the_loop_stopped_and_resumed_on_a_bucket_is_the_one_on_a_disk(
    store, finished, corpus, tmp_path, monkeypatch, capsys
):
    workdir, original, calls = "gs://bucket/runs/tiny", nla_jax.study.rollout, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(nla_jax.study, "rollout", stop)
    every = "--config.rl.checkpoint_every=2"
    assert nla_main("quickstart", workdir, corpus, every) == 130
    assert not path_to(f"{workdir}/pair").exists()
    commits = [name for name in store.puts if name.startswith("runs/tiny/train/rl/checkpoints/")]
    assert any(name.endswith("/commit_success.txt") for name in commits)
    assert len(history(path_to(workdir))) >= 2
    assert nla_main("quickstart", workdir, corpus, every) == 0

    copy = local(workdir)
    same_run(finished, copy)
    untimed = lambda folder: json.loads((folder / "summary.json").read_text()) | {"seconds_by_stage": None}
    assert untimed(copy) == untimed(finished)
    assert (copy / "report.html").stat().st_size > 10000
    assert not [name for name in store.objects if "incomplete" in name or name.endswith(".npy")]
    for split in ("rl", "heldout"):
        there, here = load_rows(path_to(workdir), split), load_rows(finished, split)
        assert np.array_equal(there.vectors, here.vectors)
    assert there.column("api_explanation") == here.column("api_explanation")

    before = dict(store.objects)
    assert nla_main("quickstart", workdir, corpus, every) == 0
    assert store.objects == before

    assert (
        main(["explain", "--pair", f"{workdir}/pair", "--text", "The import statement", "--max-new-tokens", "8"]) == 0
    )
    assert "FVE" in capsys.readouterr().out
    assert main(["export", "--workdir", workdir, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/datasets/heldout.parquet").exists()
    assert weights(copy).keys() == weights(finished).keys()
