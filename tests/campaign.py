"""Random misuse: odd settings and arguments, damaged files, kills, full disks.

    python -m tests.campaign --seed 1 --draws 100     # slow: some ten seconds a draw

Every outcome must be the right result, or one sentence and a non-zero exit status: no trace, no hang, no other result in
silence, no changed file outside the working folder. A draw is a function of seed and number alone, so that
`--seed 1 --only 17` repeats one. (Half of the full disks are real ones, of memory, which only root can mount; elsewhere
files are limited instead.) What breaks the rule is printed, and the exit status is 1.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import jax

from nla_jax.cli import load_config
from nla_jax.config import settings
from nla_jax.runtime.metrics import read_metrics
from nla_jax.stages.table import STAGES
from tests.campaign_process import Child, Outcome
from tests.xla_flags import known_flags

ROOT = Path(__file__).parent.parent
PROBES = ("after_rl", "warm_start", "gold", "empty", "extraction")
CONFIG = f"{ROOT / 'tests/study.py'}:tiny"
FAST = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)
LIGHT = (  # few programs, as each takes long to trace
    "--config.compute.remat=",
    "--config.rl.kl_coefficient=0",
    f"--config.evaluate.probes={tuple(f'nla_jax.probes.fidelity:{name}' for name in PROBES)!r}",
)
SECONDS = 600  # beyond what the undisturbed run takes: a command that still computes is taken to hang
VALUES = (-1, 0, 1, 2, 3, 7, 10**9, -0.5, 0.3, 1.5, "nan", "inf", "", "x", "nowhere:f", "../x", "()", "None", "True")
MODULES = (
    "nla_jax.verbs.stages",
    "nla_jax.verbs.check",
    "nla_jax.verbs.explain",
    "nla_jax.tools.topology",
    "tests.campaign_api",
)
LOOPS = ("sft_av", "sft_ar", "rl")
TIMES = ("seconds", "seconds_rollout", "seconds_host", "seconds_train", "samples_per_second")
TIMES += ("seconds_so_far", "cpu_seconds_so_far")
FIGURES = ("fve_rl", "fve_warm", "fve_empty", "fve_gold_text", "extraction_rate", "subject_loss", "injection_scale")


@functools.cache
def fast() -> str:
    """Flags with which programs are compiled in a fifth of the time."""
    return " ".join(known_flags(FAST))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a campaign works: the undisturbed run and what it was made from."""

    folder: Path
    seconds: float = 0.0

    @property
    def whole(self) -> Path:
        """The working folder of the undisturbed run."""
        return self.folder / "whole"

    def copy(self, before: str | None = None) -> Path:
        """A copy of that run in which the stage `before` and those after it never happened."""
        target = self.folder / "work"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.whole, target)
        names = list(STAGES)
        for name in names[names.index(before) :] if before else ():
            (target / "stages" / f"{name}.json").unlink()
            for pattern in STAGES[name].makes + STAGES[name].leaves:
                for path in target.glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        return target

    def run(
        self, *arguments: str, prepare: Callable | None = None, stop: tuple | None = None, module: str = "nla_jax.cli"
    ) -> Outcome:
        """Runs `nla` as a user does, in a process of its own; `stop`: (seconds, signal)."""
        (self.folder / "here").mkdir(exist_ok=True)
        start, child = time.monotonic(), Child(functools.partial(self.command, arguments, module, prepare))
        if stop and child.wait(stop[0]) is None:
            os.kill(child.pid, stop[1])
        status = child.wait(self.seconds + SECONDS if self.seconds else 3600)
        hangs = status is None
        if hangs:
            status = child.kill()
        return Outcome(arguments, status, *child.said(), time.monotonic() - start, hangs)

    def command(self, arguments: tuple[str, ...], module: str, prepare: Callable | None) -> int:
        """What a child does: `main` of a module, as if Python had been started for it."""
        os.chdir(self.folder / "here")
        os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")
        jax.config.update("jax_compilation_cache_dir", str(self.folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        if prepare:
            prepare()
        sys.argv[1:] = arguments
        module = importlib.import_module(module)
        return getattr(module, "command", module.main)()

    def study(self, verb: str, workdir: Path, *overrides: str, **how) -> Outcome:
        """A verb of the campaign's study."""
        corpus = f"--config.corpus.source={self.folder / 'topics.jsonl'}"
        return self.run(verb, "--config", CONFIG, "--workdir", str(workdir), corpus, *LIGHT, *overrides, **how)

    @functools.cached_property
    def explained(self) -> str:
        """What the undisturbed pair says."""
        outcome = self.explain(self.whole)
        assert outcome.status == 0, outcome.err
        return outcome.out

    def explain(self, workdir: Path) -> Outcome:
        """`nla explain` of a few tokens with the pair and the subject of a working folder."""
        how = (
            "--text",
            "The river turns north.",
            "--tokens",
            "all",
            "--max-new-tokens",
            "8",
            "--reading",
            "whole",
            "--json",
        )
        return self.run("explain", "--pair", str(workdir / "pair"), "--subject", str(workdir / "subject"), *how)

    def outside(self) -> str:
        """A hash of all that no command may change."""
        digest = hashlib.blake2b((self.folder / "topics.jsonl").read_bytes())
        for file in sorted([*(self.folder / "here").rglob("*"), *self.whole.rglob("*")]):
            digest.update(str(file).encode() + (file.read_bytes() if file.is_file() else b""))
        return digest.hexdigest()


def figures(workdir: Path) -> dict:
    """The headline of a run, and its trained weights."""
    found = json.loads((workdir / "summary.json").read_text())
    files = sorted((workdir / "pair").rglob("*.safetensors"))
    weights = [hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest() for file in files]
    records = [read_metrics(workdir / "train" / loop / "metrics.jsonl") for loop in LOOPS]
    curves = [[{k: v for k, v in record.items() if k not in TIMES} for record in loop] for loop in records]
    drawn = hashlib.blake2b(json.dumps(curves).encode(), digest_size=8).hexdigest()
    return {name: found.get(name) for name in FIGURES} | {"weights": weights, "curves": drawn}


# What can be drawn: each returns (what was done, what breaks the rule)


def odd_setting(place: Place, rng: random.Random) -> tuple[str, str]:
    """A random setting gets a random value; the stages from a random one on run with it."""
    name, field = rng.choice([item for item in settings() if item[1].type is not dict] + optimizer_settings())
    stage = rng.choice([*STAGES, "check"])
    flag = f"--config.{name}={rng.choice(VALUES)}"
    if stage == "check":
        return f"check {flag}", place.study("check", place.folder / "work", flag).wrong()
    outcome = place.study("quickstart", place.copy(stage), flag)
    return f"quickstart from {stage} {flag} -> {outcome.status} {outcome.err[-160:]!r}", outcome.wrong()


def optimizer_settings() -> list[tuple[str, None]]:
    """Numbers of open mappings."""
    config = load_config(CONFIG, [])
    found = [f"{path}.{key}" for path in ("rl.av_optimizer", "rl.ar_optimizer") for key in config.rl.av_optimizer]
    return [
        (name, None) for name in [*found, "pretrain.model.heads", "pretrain.model.width", "split.rl", "split.heldout"]
    ]


def damaged_file(place: Place, rng: random.Random) -> tuple[str, str]:
    """A byte of a random file is changed, or the file is cut short or gone; then the rest of the run is made."""
    stage = rng.choice(list(STAGES)[1:])
    workdir = place.copy(stage)
    damage = damaged(workdir, [path for path in sorted(workdir.rglob("*")) if path.name != "lock"], rng)
    outcome = place.study("quickstart", workdir)
    done = f"{damage}, quickstart from {stage} -> {outcome.status} {outcome.err[-160:]!r}"
    wrong = outcome.wrong()
    if not wrong and outcome.status == 0 and figures(workdir) != figures(place.whole):
        wrong = f"another result in silence: {figures(workdir)} instead of {figures(place.whole)}"
    return done, wrong


def damaged_pair(place: Place, rng: random.Random) -> tuple[str, str]:
    """The same with a file of the finished pair or of its subject, which then explains a text. A note that something has
    changed is enough where people may change it."""
    workdir = place.copy()
    files = [path for name in ("pair", "subject") for path in sorted((workdir / name).rglob("*"))]
    damage, plain, outcome = damaged(workdir, files, rng), place.explained, place.explain(workdir)
    wrong = outcome.wrong()
    if not wrong and outcome.status == 0 and outcome.out != plain and "has changed since" not in outcome.err:
        wrong = f"another explanation in silence: {outcome.out[:300]}"
    return f"{damage}, explain -> {outcome.status} {outcome.err[-160:]!r}", wrong


def damaged(workdir: Path, paths: list[Path], rng: random.Random) -> str:
    """Changes a bit of one of these files, cuts it short or removes it; returns what was done."""
    file = rng.choice([path for path in paths if path.is_file()])
    content, kind = bytearray(file.read_bytes()), rng.choice(("byte", "byte", "cut", "gone"))
    at = rng.randrange(max(1, len(content)))
    if kind == "byte" and content:
        content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content[:at] if kind == "cut" else content)
    if kind == "gone":
        file.unlink()
    return f"{kind} {at} of {file.relative_to(workdir)}"


def killed(place: Place, rng: random.Random) -> tuple[str, str]:
    """A signal at a random moment; the same command then gives what it would have given."""
    stage, name = rng.choice(list(STAGES)), rng.choice(("SIGKILL", "SIGTERM", "SIGINT"))
    workdir, seconds = place.copy(stage), rng.uniform(2, max(3.0, place.seconds))
    sent = getattr(signal, name)
    first = place.study("quickstart", workdir, stop=(seconds, sent))
    wrong = first.wrong((0, -sent, 128 + sent))
    return again(place, workdir, f"{name} after {seconds:.1f} s, quickstart from {stage} -> {first.status}", wrong)


def full_disk(place: Place, rng: random.Random) -> tuple[str, str]:
    """The disk has a random number of bytes left, or no file may grow beyond a random size. Without that limit the same
    command then gives what it would have given."""
    stage, size = rng.choice(list(STAGES)), int(10 ** rng.uniform(2, 6))
    if rng.random() < 0.5 and (disk := mounted(place.folder / "disk")):
        try:
            return small_disk(place, place.copy(stage), disk, stage, size)
        finally:
            subprocess.run(["umount", disk], check=True)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    workdir = place.copy(stage)
    first = place.study("quickstart", workdir, prepare=limit)
    done = f"files of at most {size} bytes, quickstart from {stage} -> {first.status} {first.err[-160:]!r}"
    return again(place, workdir, done, first.wrong())


def mounted(disk: Path) -> Path | None:
    """A disk of memory at `disk`; None where this process may not make one."""
    disk.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "campaign", disk], capture_output=True)
    return None if made.returncode else disk


def small_disk(place: Place, copy: Path, disk: Path, stage: str, size: int) -> tuple[str, str]:
    """`full_disk` on a disk with `size` bytes to spare, which then becomes larger."""
    workdir = shutil.copytree(copy, disk / "work")
    full, sized = shutil.disk_usage(disk).used + size, ["mount", "-o"]
    subprocess.run([*sized, f"remount,size={full}", disk], check=True)
    first = place.study("quickstart", workdir)
    subprocess.run([*sized, "remount,size=1g", disk], check=True)
    done = f"a disk with {size} bytes left, quickstart from {stage} -> {first.status} {first.err[-160:]!r}"
    return again(place, workdir, done, first.wrong())


def again(place: Place, workdir: Path, done: str, wrong: str) -> tuple[str, str]:
    """The same command once more, to its end."""
    second = place.study("quickstart", workdir)
    wrong = wrong or second.wrong((0,))
    if not wrong and figures(workdir) != figures(place.whole):
        wrong = f"then another result: {figures(workdir)} instead of {figures(place.whole)}"
    return done, wrong


def odd_arguments(place: Place, rng: random.Random) -> tuple[str, str]:
    """Functions of the package are called with odd arguments (tests/campaign_api.py)."""
    folders = ("--pair", f"{place.whole / 'pair'}", "--subject", f"{place.whole / 'subject'}")
    scratch = ("--scratch", f"{place.folder / 'scratch'}", "--draw", str(rng.random()))
    outcome = place.run(*folders, *scratch, module="tests.campaign_api")
    calls = [json.loads(line) for line in outcome.out.splitlines()]
    broken = [f"{done}: {wrong}" for done, wrong in calls if wrong]
    return f"{len(calls)} calls ({' '.join(scratch[2:])})", outcome.wrong((0,)) or "; ".join(broken)


KINDS = (odd_setting, damaged_file, damaged_pair, killed, full_disk, odd_arguments)


def main() -> int:
    """Runs a campaign and prints each draw; returns 1 where one breaks the rule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--only", type=int, help="the number of one draw, from 0")
    parser.add_argument("--kind", choices=[kind.__name__ for kind in KINDS], help="only draws of this kind")
    asked = parser.parse_args()
    os.environ |= {"XLA_FLAGS": fast(), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    jax.config.update("jax_platforms", "cpu")
    for module in (*{stage.run.partition(":")[0] for stage in STAGES.values()}, *MODULES):
        importlib.import_module(module)
    scratch = tempfile.mkdtemp()  # no `TemporaryDirectory`, which a forked process would remove at its end
    try:
        return int(drawn(Path(scratch), asked) > 0)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def drawn(folder: Path, asked: argparse.Namespace) -> int:
    """Makes the draws that are asked for, and prints each; returns how many break the rule."""
    kinds = [kind for kind in KINDS if asked.kind in (None, kind.__name__)]
    place, broken, start = prepared(folder), 0, time.monotonic()
    before, numbers = place.outside(), range(asked.draws) if asked.only is None else [asked.only]
    for i in numbers:
        rng = random.Random(f"{asked.seed}-{i}")
        done, wrong = rng.choice(kinds)(place, rng)
        if not wrong and place.outside() != before:
            wrong = "a file outside the working folder has changed"
        broken += bool(wrong)
        print(f"{'WRONG' if wrong else 'right'} {i}: {done}{f' :: {wrong}' if wrong else ''}", flush=True)
        if wrong:
            before = place.outside()
    print(f"{broken} of {len(numbers)} draws break the rule, in {time.monotonic() - start:.0f} s")
    return broken


def prepared(folder: Path) -> Place:
    """The undisturbed run, made twice: the second time its programs are compiled, which is what later draws meet."""
    chosen = [(name, text[:1500]) for name, text in sorted(topics.items()) if len(text) > 800][:40]
    lines = [json.dumps({"id": name, "text": text}) + "\n" for name, text in chosen]
    (folder / "topics.jsonl").write_text("".join(lines))
    place = Place(folder)
    for _ in range(2):
        shutil.rmtree(place.whole, ignore_errors=True)
        outcome = place.study("quickstart", place.whole)
        assert outcome.status == 0, outcome.err
    print(f"the undisturbed run takes {outcome.seconds:.0f} s", flush=True)
    return dataclasses.replace(place, seconds=outcome.seconds)


if __name__ == "__main__":
    sys.exit(main())
