"""The `label` stage: an explanation of each activation's text, for the warm start."""

import pyarrow as pa

from nla_jax.data.activations import TEXT
from nla_jax.data.rows import LABEL, shards_of
from nla_jax.io.files import AnyPath
from nla_jax.io.parquet import columns_of, read_table, write_table
from nla_jax.labels.labeller import CheckedLabeller, make_labeller, rows_of
from nla_jax.runtime.distributed import barrier, share
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress
from nla_jax.runtime.run import Run


def label(run: Run) -> None:
    """Writes `{workdir}/labels/{shard}.parquet` with one `api_explanation` for each row of a shard of activations.

    Labels that a shard has already are taken over; the others are made by `label.labeller`, `label.batch` at a time. Each
    host labels its share of the shards."""
    c = run.config.label
    with run.stage("label") as result:
        if result is None:
            return
        run.require("extract")
        files = [file for split in c.splits for file in shards_of(run.workdir / "activations", split)]
        labeller = make_labeller(c.labeller, c.settings)
        progress = Progress("label", len(share(files)))
        for file in share(files):
            target = run.workdir / "labels" / file.name
            if not target.exists():
                labels = existing_labels(file) or label_shard(file, labeller, target.parent / "partial", c.batch)
                write_table(pa.table({LABEL: pa.array(labels, pa.string())}), target)
                for part in parts_of(target.parent / "partial", file.stem):
                    part.unlink()
            progress.update()
        progress.close()
        barrier("the labels")
        result["shards"] = len(files)


def label_shard(file: AnyPath, labeller: CheckedLabeller, folder: AnyPath, batch: int) -> list[str]:
    """A label of each row of a shard, made `batch` at a time.

    Those that are made are kept under `folder`: when a later text fails, they are not asked for, nor paid for, again."""
    rows, labels = rows_of(file), []
    for part in parts_of(folder, file.stem):
        labels += read_table(part, [LABEL]).column(0).to_pylist()
    for start in range(len(labels), len(rows), batch):
        made = labeller.label(rows[start : start + batch])
        write_table(pa.table({LABEL: pa.array(made, pa.string())}), folder / f"{file.stem}-{start:09d}.parquet")
        labels += made
    return labels


def parts_of(folder: AnyPath, shard: str) -> list[AnyPath]:
    """The files with the first labels of a shard, in order."""
    return sorted(folder.glob(f"{shard}-*.parquet"))


def existing_labels(file: AnyPath) -> list[str] | None:
    """The labels that a shard has; None where it has texts from which to make them. Raises `InputError` for neither."""
    columns = columns_of(file)
    if LABEL in columns:
        return read_table(file, [LABEL]).column(0).to_pylist()
    if TEXT in columns:
        return None
    raise InputError(
        f"{file} has neither {LABEL} nor {TEXT}, from which to make it; give extract.source files that have one of them, "
        f"or take its split out of label.splits."
    )
