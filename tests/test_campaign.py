"""A few draws of the campaign: functions called with odd arguments, in a process of their own, as users call them (the
checks of types that the other tests run under would refuse most of them first)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign import fast

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("draw", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_odd_arguments_give_the_right_result_or_one_sentence(finished, tmp_path, draw):
    folders = ["--pair", finished / "pair", "--subject", finished / "subject", "--scratch", tmp_path / "new"]
    command = [sys.executable, "-m", "tests.campaign_api", *folders, "--draw", draw, "--calls", "80"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": fast(), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    calls = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0 and len(calls) == 80, ended.stderr[-2000:]
    assert not [(done, wrong) for done, wrong in calls if wrong]
