"""The subject's KL of each reconstruction of an RL step, as a feature of the reward."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import SENTENCES, joint_batch

import nla_jax as nla
from nla_jax.data.rows import Rows
from nla_jax.io.parquet import write_table
from nla_jax.models.sharding import device_mesh, place_batch
from nla_jax.runtime.errors import InputError
from nla_jax.stages.downstream import Downstream
from nla_jax.subject import extract, load_subject

GROUP, LAYER = 3, 1


@pytest.fixture(scope="module")
def acts(subject_folder):
    """Four activations of texts of several lengths; each is of the last token that has been read."""
    return extract(load_subject(subject_folder, LAYER), [SENTENCES[i][: 20 + 20 * i] for i in range(4)])


@pytest.fixture
def data(acts, tmp_path) -> Rows:
    """The activations as rows of a run."""
    acts.save(file := tmp_path / "rl-00000-of-00001.parquet")
    return Rows(acts.vectors, (file,))


@pytest.mark.parametrize("devices", [1, 4])
def test_it_is_the_kl_of_the_patched_subject(pair, acts, data, subject_folder, devices):
    """As `nla.patch` and the definition give it, from what the AR rebuilds."""
    mesh, rows = device_mesh((1, devices, 1), jax.devices()[:devices]), np.array([3, 0, 2, 1])
    subject = load_subject(subject_folder, LAYER, mesh=mesh if devices > 1 else None)
    study = SimpleNamespace(mesh=mesh, reconstructor=pair.reconstructor)
    study.config = SimpleNamespace(rl=SimpleNamespace(micro_batches=1 + devices // 4))
    made = joint_batch(pair, acts.vectors[rows], GROUP, 5, 9).replace(features={"other": np.zeros(12, np.float32)})
    with jax.set_mesh(mesh):
        batch = place_batch(mesh, made)
        found = Downstream(study, subject, data, None)(batch, rows, pair.reconstructor_params).features
    assert found.keys() == {"other", "subject_kl"} and found["subject_kl"].sharding == batch.valid.sharding
    recon = jax.jit(pair.reconstructor.reconstruct)(pair.reconstructor_params, made.texts, made.text_lengths)
    ids = [acts.token_ids[i] for i in np.repeat(rows, GROUP)]
    plain = load_subject(subject_folder, LAYER)
    clean, patched = nla.patch(plain, ids, "last", {"clean": None, "recon": np.asarray(recon)}).values()
    p, q = (np.concatenate(x).astype(np.float64) for x in (clean, patched))
    expected = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(found["subject_kl"], expected, rtol=1e-3, atol=1e-5)
    assert len(set(expected.round(4))) == 12  # no two are mistaken for each other


def test_a_broken_reconstruction_has_none_and_rows_without_tokens_are_refused(
    pair, acts, data, subject_folder, tmp_path
):
    subject, study = load_subject(subject_folder, LAYER), SimpleNamespace(reconstructor=pair.reconstructor)
    recon = acts.vectors[[1, 1]] * np.array([[7], [np.nan]], np.float32)
    found = Downstream(study, subject, data, None).divergence(np.array([1]), np.array([4, 5]), recon, 4)
    assert found[0] == pytest.approx(0, abs=1e-5) and np.isnan(found[1])
    write_table(acts.table().drop_columns(["token_ids"]), file := tmp_path / "theirs.parquet")
    with pytest.raises(InputError, match="theirs.parquet has no column token_ids, without which the subject"):
        Downstream(study, subject, Rows(acts.vectors, (file,)), None)
