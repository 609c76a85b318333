"""Puts a quickstart's trained pair into the package, where `nla explain --pair quickstart` finds it.

    nla quickstart --config configs/quickstart.py:pair --workdir runs/pair
    nla probe --workdir runs/pair --probes nla_jax.probes.confidence:confidence
    python experiments/quickstart/ship_pair.py runs/pair

The pair is written in bfloat16, and names the shipped subject, whose weights must be those that the run used. Beside it
stands what the probe has learned: how sure one may be of its claims (`nla explain --confidence`).
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import jax
import numpy as np

from nla_jax.io.folders import load_params, read_config
from nla_jax.io.hub import fingerprint
from nla_jax.io.pairs import SHIPPED as PAIR
from nla_jax.pair import load_pair
from nla_jax.probes.evidence import FILE
from nla_jax.runtime.errors import InputError
from nla_jax.subject import SHIPPED as SUBJECT

PROBE = "nla_jax.probes.confidence:confidence"


def main(workdir: Path) -> None:
    """Writes the folder."""
    used, shipped = (load_params(folder, read_config(folder)) for folder in (workdir / "subject", SUBJECT))
    same = jax.tree.map(np.array_equal, used, shipped)
    if not all(jax.tree.leaves(same)):
        sys.exit(f"{workdir}/subject is not the shipped subject; their weights differ.")
    if not (confidence := workdir / "pair" / FILE).exists():
        sys.exit(f"{confidence} is not there; `nla probe --workdir {workdir} --probes {PROBE}` makes it.")
    pair = load_pair(workdir / "pair", dtype="bfloat16")
    facts = pair.sidecar.provenance | {"base_hash": fingerprint(SUBJECT)}
    sidecar = dataclasses.replace(pair.sidecar, base_checkpoint="quickstart/subject", provenance=facts)
    shutil.rmtree(PAIR, ignore_errors=True)
    dataclasses.replace(pair, sidecar=sidecar).save(PAIR)
    shutil.copy(confidence, PAIR)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="the folder of the finished run")
    try:
        main(parser.parse_args().workdir)
    except InputError as error:
        sys.exit(str(error))
