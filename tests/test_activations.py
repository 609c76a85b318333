"""Activations are finite or refused where they arise; attention sinks are said; meshes from elsewhere work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from conftest import SENTENCES, one_sentence

from nla_jax.config import Extract
from nla_jax.data.activations import median_norm_and_variance
from nla_jax.data.corpus import Document
from nla_jax.data.rows import load_rows
from nla_jax.io.folders import load_params, load_tokenizer, read_config, save_model
from nla_jax.io.parquet import VECTORS, list_column, write_table
from nla_jax.runtime.errors import InputError
from nla_jax.stages.extract import sample_activations, say_sinks
from nla_jax.subject import attention_sinks, extract, load_subject


def test_a_token_without_an_embedding_is_named(subject_folder):
    """As Gemma 3's image token in its text models: it would turn its whole text into NaN."""
    tokenizer = load_tokenizer(subject_folder)
    tokenizer.add_tokens(["<image>"])
    more = dataclasses.replace(load_subject(subject_folder, 1), tokenizer=tokenizer)
    documents = [Document("plain", SENTENCES[0]), Document("picture", f"{SENTENCES[1]} <image> {SENTENCES[2]}")]
    for run in (
        lambda: extract(more, [document.text for document in documents], doc_ids=["plain", "picture"]),
        lambda: sample_activations(more, documents, Extract(positions=4, min_position=5), 0),
    ):
        with pytest.raises(
            InputError, match=r"Token '<image>' \(id \d+, position \d+ of 'picture'\) is none of the 320"
        ):
            run()


def test_activations_that_are_not_finite_are_named(subject_folder, tmp_path):
    """float16 ends at 65504."""
    params, config = load_params(subject_folder, read_config(subject_folder)), read_config(subject_folder)
    params["embedding"] = params["embedding"] * 1e6
    save_model(tmp_path / "loud", params, config, load_tokenizer(subject_folder))
    assert np.isfinite(extract(load_subject(tmp_path / "loud", 1), SENTENCES[0]).vectors).all()
    with pytest.raises(
        InputError, match=r"token '.*' \(position \d+ of '0'\) is not finite in float16; compute in bf"
    ) as e:
        extract(load_subject(tmp_path / "loud", 1, dtype=jnp.float16), SENTENCES[0])
    one_sentence(e)


def test_attention_sinks_are_said_with_their_positions(tmp_path, capsys):
    vectors = np.ones((40, 8), np.float32)
    vectors[[3, 7]], vectors[9] = 5.01, 4.99
    assert np.flatnonzero(attention_sinks(np.linalg.norm(vectors, axis=1))).tolist() == [3, 7]
    strings = pa.array([""] * 40)
    table = pa.table(
        {VECTORS: list_column(vectors), "n_raw_tokens": pa.array(np.arange(40) % 5 + 1), "doc_id": strings}
    )
    write_table(table, tmp_path / "activations/rl-00000-of-00001.parquet")
    assert say_sinks([load_rows(tmp_path, "rl")], (12,)) == 2
    said = capsys.readouterr().err
    assert "2 of 40 activations after block 12 are attention sinks" in said and "positions 3 (1), 2 (1)" in said
    assert attention_sinks(np.zeros(0)).shape == (0,)


def test_the_injection_scale_is_not_moved_by_attention_sinks():
    vectors = np.random.default_rng(0).normal(size=(101, 8)).astype(np.float32)
    norm, _ = median_norm_and_variance(vectors, chunk=10)
    vectors[:5] *= 100
    assert median_norm_and_variance(vectors, chunk=10)[0] == pytest.approx(norm, rel=0.1)


def test_a_mesh_of_jax_make_mesh_works(subject_folder):
    """Its axes are explicit, which no constraint of this package expects."""
    expected = extract(load_subject(subject_folder, 1), SENTENCES, "all").vectors
    mesh = jax.make_mesh((1, 8, 1), ("data", "fsdp", "tensor"))
    found = extract(load_subject(subject_folder, 1, mesh=mesh), SENTENCES, "all").vectors
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(InputError, match="has the axes data, fsdp, tensor; found .*model.*; nla_jax.make_mesh"):
        load_subject(subject_folder, 1, mesh=jax.make_mesh((8,), ("model",)))
