"""The `label` stage: an explanation of each activation's text, for the warm start."""

import collections
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from nla_jax.data.activations import TEXT
from nla_jax.data.rows import LABEL, NO_LABEL, shards_of
from nla_jax.io.files import AnyPath
from nla_jax.io.parquet import columns_of, read_table, row_count, write_table
from nla_jax.labels.cache import Cache
from nla_jax.labels.calls import as_done
from nla_jax.labels.labeller import CheckedLabeller, Label, LabelRow, NoLabel, configured_labeller, rows_of
from nla_jax.runtime.distributed import barrier, is_writer, share
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress
from nla_jax.runtime.run import Run

METADATA = "nla_jax.labels"  # the key under which a file of labels says what made them
TRIAL = 20  # answers of which one at least must be a label


def label(run: Run) -> None:
    """Writes `{workdir}/labels/{shard}.parquet` with one `api_explanation` for each row of a shard of activations.

    Labels that a shard has already are taken over; the others are made by `label.labeller`. Each host labels its share
    of the shards. Where the labeller has no label of a row, its entry is null, and a column `no_label` says why."""
    with run.stage("label") as result:
        if result is None:
            return
        run.require("extract")
        files = shards(run)
        labelling = Labelling(run, share(files))
        try:
            for file in share(files):
                if not labelling.target(file).exists() and (labels := existing_labels(file)) is not None:
                    labelling.write(file, labels, {"taken from": str(file)})
            labelling.finish()
        finally:
            labelling.cache.close()
        barrier("the labels")
        result |= {"shards": len(files)} | counts([labelling.target(file) for file in files])
        say_missing(result)


def shards(run: Run) -> list[AnyPath]:
    """The shards of activations that get labels."""
    return [file for split in run.config.label.splits for file in shards_of(run.workdir / "activations", split)]


def cache_of(run: Run) -> Cache:
    """What the labeller has answered in this working folder."""
    return Cache(run.workdir / "labels" / "cache")


def labeller_of(run: Run) -> CheckedLabeller:
    """The labeller of the config, with a folder in the working folder."""
    labeller = configured_labeller(run.config.label)
    labeller.work_in(run.workdir / "labels" / "work")
    _ = labeller.facts  # on every host: the version may be a hash that all hosts ask the first one for
    return labeller


class Labelling:
    """The labels of some shards while they are made: which texts are under way, and which shards wait for them."""

    def __init__(self, run: Run, files: Sequence[AnyPath]):
        self.run, self.settings, self.files = run, run.config.label, files
        self.labeller, self.cache = labeller_of(run), cache_of(run)
        self.keys: dict[AnyPath, list[str]] = {}  # of each row of a shard that is not written yet
        self.waits: dict[str, list[AnyPath]] = {}  # shards that wait for a key
        self.missing = collections.Counter()  # how many keys a shard waits for
        self.asked, self.cached, self.answered, self.dropped = 0, 0, 0, 0  # rows, rows, texts, texts
        self.last = NoLabel("")
        self.total = sum(map(row_count, files))

    def target(self, file: AnyPath) -> AnyPath:
        """Where the labels of a shard are written."""
        return self.run.workdir / "labels" / file.name

    def finish(self) -> None:
        """Asks for all labels that are missing, and writes each shard when it has all of its own.

        Raises `InputError` where too many texts have no label."""
        c, written = self.settings, [target for file in self.files if (target := self.target(file)).exists()]
        before = counts(written)
        self.answered, self.dropped = before["rows"], sum(before["no_label"].values())
        progress, start = Progress("label", self.total, before["rows"]), time.monotonic()
        ask = lambda rows: dict(zip(rows, self.labeller.label(list(rows.values()))))
        for _, answers in as_done(ask, self._calls(), c.concurrency or self.labeller.concurrency):
            self.cache.add(answers)
            for key, answer in answers.items():
                self._count(answer)
                for file in self.waits.pop(key):
                    self.missing[file] -= 1
                    if not self.missing[file]:
                        self._complete(file)
            self.asked += len(answers)
            progress.total = self.total - self.cached
            progress.update(len(answers), **{"texts/s": self.asked / (time.monotonic() - start)})
        progress.close()
        self._check()

    def _calls(self) -> Iterator[Mapping[str, LabelRow]]:
        """The rows of each call by their keys, in the order of the shards; rows with equal keys are asked for once."""
        batch = self.settings.batch or self.labeller.batch
        for file in self.files:
            if self.target(file).exists():
                continue
            rows = rows_of(file)
            self.keys[file] = keys = list(map(self.labeller.key, rows))
            new = {}
            for key, row in dict(zip(keys, rows)).items():
                if key in self.cache.answers:
                    self._count(self.cache.answers[key])
                    continue
                if key not in self.waits:
                    new[key] = row
                self.waits.setdefault(key, []).append(file)
                self.missing[file] += 1
            self.cached += len(keys) - len(new)
            if not self.missing[file]:
                self._complete(file)
            items = list(new.items())
            for start in range(0, len(items), batch):
                self._check()
                yield dict(items[start : start + batch])

    def _count(self, answer: Label) -> None:
        self.answered += 1
        if isinstance(answer, NoLabel):
            self.dropped, self.last = self.dropped + 1, answer

    def _check(self) -> None:
        """Raises `InputError` where too many texts have no label."""
        hopeless = self.dropped == self.answered >= TRIAL
        if hopeless or self.dropped > self.settings.max_dropped * self.total:
            detail = f": {self.last.detail}" if self.last.detail else ""
            raise InputError(
                f"{self.dropped} of {self.total} texts have no label (the last one: {self.last.why}{detail}), more than "
                f"label.max_dropped = {self.settings.max_dropped:g} allows; what is answered is kept. Raise it to leave "
                f"them out, or change the labeller."
            )

    def _complete(self, file: AnyPath) -> None:
        answers = self.cache.answers
        self.write(file, [answers[key] for key in self.keys.pop(file)], self.labeller.facts)

    def write(self, file: AnyPath, labels: Sequence[Label | None], facts: dict) -> None:
        """Writes the labels of a shard; the file's metadata say what made them."""
        columns = {LABEL: pa.array([text if isinstance(text, str) else None for text in labels], pa.string())}
        if any(isinstance(label, NoLabel) for label in labels):
            why = [label.why if isinstance(label, NoLabel) else None for label in labels]
            columns[NO_LABEL] = pa.array(why, pa.string())
        table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps(facts, default=repr)})
        write_table(table, self.target(file))


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


def counts(files: Sequence[AnyPath]) -> dict:
    """How many labels the files hold, and of how many rows there is none, by why."""
    why = collections.Counter()
    for file in files:
        if NO_LABEL in columns_of(file):
            found = pc.value_counts(read_table(file, [NO_LABEL]).column(0).drop_null())
            why.update({entry["values"]: entry["counts"] for entry in found.to_pylist()})
    return {"rows": sum(map(row_count, files)), "no_label": dict(sorted(why.items()))}


def say_missing(result: dict) -> None:
    """Says on standard error how many rows have no label."""
    if (dropped := sum(result["no_label"].values())) and is_writer():
        why = ", ".join(f"{count} {why}" for why, count in result["no_label"].items())
        print(
            f"label: {dropped} of {result['rows']} texts have no label ({why}); the warm start leaves them out.",
            file=sys.stderr,
        )
