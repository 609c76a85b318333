"""What is found out before anything runs: wrong settings, functions, batches and splits; and the verb `nla check`."""

import ast
import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import pytest
import yaml
from absl import logging
from conftest import CONFIG, LOOP, SENTENCES, copy_before, flip, nla_main, one_line
from parity import GOLDEN

import nla_jax as nla
from nla_jax.cli import load_config, main, sentence, sigterm_raises
from nla_jax.data.corpus import Document
from nla_jax.io import hub
from nla_jax.io.folders import load_params, read_config
from nla_jax.models.lora import Lora
from nla_jax.models.sharding import make_mesh
from nla_jax.pair import new_pair
from nla_jax.runtime import notes
from nla_jax.runtime.errors import InputError, Terminated, handle_unraisable
from nla_jax.stages.check import check_batches, check_documents, check_functions, trained
from nla_jax.study import Study
from nla_jax.subject import subject_config
from nla_jax.verbs.check import bytes_written, sampled_labels

QUICKSTART = str(Path(__file__).parent.parent / "configs/quickstart.py") + ":tiny"

WRONG = {  # overrides, and what is said; nothing may have run
    "reward that is not there": (["rl.reward=mine:f"], "rl.reward names the module 'mine', which cannot be found"),
    "a name that a built-in module does not have": (
        ["rl.reward=sys:nobody"],
        "rl.reward names 'nobody', but sys has no",
    ),
    "a list": (["rl.advantage=sys:path"], "rl.advantage names 'path' of sys, which is list, no function"),
    "optimizer that takes no such setting": (
        ["pretrain.optimizer.function=optax:adamw"],
        "pretrain.optimizer.function = optax:adamw",
    ),
    "seed beyond 32 bits": (["seed=99999999999999999999"], "seed is 99999999999999999999; it must be at most"),
    "optimizer that is not there": (["pretrain.optimizer.function=optax:nobody"], "pretrain.optimizer.function names"),
    "learning rate that is none": (["rl.av_optimizer.lr=nan"], "rl.av_optimizer.lr is nan, expected a finite number"),
    "learning rate that is infinite": (["sft.ar.optimizer.lr=1e999"], "sft.ar.optimizer.lr is inf"),
    "learning rate below 0": (
        ["sft.av.optimizer.lr=-1.0"],
        "sft.av.optimizer: Muon's lr is -1.0; it must be at least 0",
    ),
    "decay of 1": (["rl.ar_optimizer.b2=1.0"], "rl.ar_optimizer: AdamW's b2 is 1.0; it must be at least 0 and below 1"),
    "group of one": (["rl.group=1"], "rl.group is 1; it must be at least 2"),
    "infinite temperature": (["rl.temperature=inf"], "rl.temperature is inf, expected a finite number"),
    "KL below 0": (["rl.kl_coefficient=-5.0"], "rl.kl_coefficient is -5.0; it must be at least 0"),
    "dtype that is none": (["compute.dtype=flat32"], "compute.dtype is 'flat32'; it must be one of"),
    "remat that is none": (["compute.remat=foo"], "compute.remat is 'foo'; it must be one of"),
    "heads that are none": (["pretrain.model.heads=0"], "pretrain.model.heads is 0; it must be a whole number from 1"),
    "heads in odd groups": (["pretrain.model.heads=3", "pretrain.model.kv_heads=2"], "no multiple of kv_heads"),
    "a shape that is unknown": (["pretrain.model.hats=3"], "pretrain.model makes no model"),
    "layer beyond the model": (["subject.layer=7"], "subject.layer 7 does not exist: pretrain.model has 3 blocks"),
    "shares beyond 1": (["split.rl=0.9"], "The shares under split add up to 1.7; they must add up to 1"),
    "share below 0": (["split.rl=-0.2"], "split.rl is -0.2, expected a share"),
    "two places for an activation": (
        ["prompts.verbalizer_template={injection_char} {injection_char}"],
        "prompts.verbalizer_template holds {injection_char} 2 times",
    ),
    "no place for the text": (["prompts.reconstructor_template=Summary:"], "holds {explanation} 0 times"),
    "some datasets": (["extract.source.av_sft=a.parquet"], "extract.source.ar_sft is empty, but other files are given"),
    "datasets that are not there": (
        [f"extract.source.{split}={split}.parquet" for split in ("av_sft", "ar_sft", "rl")],
        "extract.source.av_sft names av_sft.parquet, which is no file",
    ),
    "batch that the mesh does not divide": (
        ["mesh.data=8"],
        r"pretrain.batch is 4 rows, which the 8 devices of the mesh (data=8 x fsdp=1 x tensor=1) do not divide",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_found_before_anything_runs(case, corpus, tmp_path, capsys):
    overrides, said = WRONG[case]
    assert nla_main("quickstart", tmp_path / "run", corpus, *(f"--config.{text}" for text in overrides)) == 1
    assert said in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_no_number_is_found(tmp_path, monkeypatch):
    """log(-mse) is NaN for every response; a failed one may not be infinitely bad either."""
    code = "import jax.numpy as jnp\n\n\ndef bad(s):\n    return jnp.log(-s.mse)\n\n\n"
    code += "def worst(s):\n    return jnp.where(s.valid, -s.mse, -jnp.inf)\n"
    (tmp_path / "rewards_of_mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name, said in (("bad", "gives nan for a failed response of mse 2.00"), ("worst", "gives -inf for a failed")):
        config = load_config(CONFIG, [f"--config.rl.reward=rewards_of_mine:{name}"])
        with pytest.raises(InputError, match=said):
            check_functions(config, LOOP)
    check_functions(load_config(CONFIG, []), LOOP)


def test_a_probe_that_asks_for_more_than_a_run_has(tmp_path, monkeypatch):
    code = (
        "from nla_jax.probes.probe import probe\n\n\n@probe('T', needs=('judge',))\ndef judged(context):\n    'Asks.'\n"
    )
    (tmp_path / "probes_of_mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="needs 'judge'; a run has pair, warm, labels"):
        check_functions(load_config(CONFIG, ["--config.evaluate.probes=probes_of_mine:judged"]), LOOP)


@pytest.mark.parametrize(
    "overrides, named",
    [
        (["sft.av.batch=12"], "sft.av.batch is 12"),
        (["sft.ar.batch=9"], "sft.ar.batch is 9"),
        (["rl.activations=3"], r"rl.activations \* rl.group is 12"),
        (["rl.rollout_chunks=4"], r"rl.activations \* rl.group / rl.rollout_chunks is 4"),
        (["rl.micro_batches=4"], r"rl.activations \* rl.group / rl.micro_batches is 4"),
    ],
)
def test_batches_that_the_mesh_does_not_divide(overrides, named):
    config = load_config(CONFIG, [f"--config.{text}" for text in overrides])
    check_batches(config, make_mesh(1, 1, 1), LOOP)
    with pytest.raises(InputError, match=f"{named} rows, which the 8 devices of the mesh"):
        check_batches(config, make_mesh(2, 2, 2), ("sft", "rl"))


def test_splits_are_checked_from_ids_alone():
    """Before a model is loaded: the documents have no text here."""
    config = load_config(CONFIG, ["--config.extract.positions=1", "--config.rl.activations=12"])
    documents = [Document(f"document {i}", "") for i in range(200)]
    found = check_documents(config, documents)
    assert sum(found.values()) == 200 and all(count > 20 for count in found.values())
    with pytest.raises(InputError, match="None of the 1 documents falls into split"):
        check_documents(config, documents[:1])
    with pytest.raises(InputError, match=r"Split 'rl' has \d+ of the 40 documents.* fewer than rl.activations \(12\)"):
        check_documents(config, documents[:40])


def test_an_empty_split_is_found_before_the_first_stage_loads_a_model(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nla_jax.stages.pretrain.train_tokenizer", lambda *_: pytest.fail("the stage went on"))
    assert nla_main("quickstart", tmp_path / "run", corpus, "--config.corpus.max_documents=2") == 1
    assert "of the 2 documents falls into split" in one_line(capsys)
    monkeypatch.setattr("nla_jax.stages.extract.load_subject", lambda *_: pytest.fail("the subject was loaded"))
    flags = ["--config.corpus.max_documents=2", "--config.subject.path=nla_jax/quickstart/subject"]
    assert nla_main("extract", tmp_path / "other", corpus, *flags) == 1
    assert "of the 2 documents falls into split" in one_line(capsys)


# The verb


def check(capsys, *flags: str) -> dict[str, str]:
    """What `nla check` printed, by its first word."""
    capsys.readouterr()
    assert main(["check", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len({line.partition("  ")[0] for line in lines})
    return {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in lines}


def test_check_says_what_a_run_would_need(tmp_path, capsys):
    found = check(capsys, "--config", QUICKSTART, "--workdir", str(tmp_path / "run"), "--labels", "8")
    assert list(found)[:5] == ["functions", "mesh", "memory", "documents", "disk"]
    assert re.search(r"heldout \d+, rl \d+; at most 8 activations of each", found["documents"])
    longer = r"(; \d of 8 are longer, and are not trained on)?"  # on Pythons whose topics read otherwise
    assert re.fullmatch(rf"\d+ to \d+ tokens in 8 samples, 44 allowed{longer}", found["labels"])
    assert found["AV reads"] == "'<|bos|><|user|>Explain this activation: ㈎<|assistant|>'"
    writes, reads = map(ast.literal_eval, (found["AV writes"], found["AR reads"]))
    assert re.fullmatch(r"<explanation>\n.* … .*\n</explanation><\|end\|>", writes)
    assert reads == "<|bos|><text>" + writes[len("<explanation>\n") : -len("\n</explanation><|end|>")]
    assert not (tmp_path / "run").exists()


def test_check_reads_no_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nla_jax.io.folders.load_params", lambda *_, **__: pytest.fail("weights were read"))
    assert "labels" not in check(capsys, "--config", QUICKSTART, "--workdir", str(tmp_path), "--labels", "0")


def test_check_shows_no_warnings_of_libraries_and_refuses_a_negative_number_of_labels(tmp_path, capsys):
    logging.set_verbosity(logging.WARNING)
    assert main(["check", "--config", QUICKSTART, "--workdir", str(tmp_path), "--labels", "-3"]) == 1
    assert "--labels of 0 or more" in one_line(capsys)
    assert logging.get_verbosity() == logging.FATAL


def test_check_before_the_tokenizer_is_trained(corpus, tmp_path, capsys):
    flags = ["--config", CONFIG, "--workdir", str(tmp_path), f"--config.corpus.source={corpus}"]
    assert check(capsys, *flags)["prompts"] == "not looked at: the subject's tokenizer is not here yet"


SHORT = {  # what is short, and what is said
    "disk": ("writes about .* GiB, and .* has 0.0 free; make room, keep fewer checkpoints", []),
    "memory": ("needs 0.0 GiB a device for parameters, optimizers and batch alone, and a device has 0.0", []),
    "labels": (
        r"8 of 8 labels need more than prompts.max_new_tokens = 9 tokens",
        ["--config.prompts.max_new_tokens=9"],
    ),
    "rows of a step": ("joint_step needs .* GiB a device", ["--config.rl.activations=1000000000"]),  # only counted
    "documents": ("None of the 2 documents falls into split", ["--config.corpus.max_documents=2"]),
}


@pytest.mark.parametrize("case", SHORT)
def test_check_finds_what_would_run_short(case, tmp_path, monkeypatch, capsys):
    said, flags = SHORT[case]
    if case == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    if case == "memory":
        monkeypatch.setattr("nla_jax.verbs.check.device_memory", lambda: 1000.0)
    flags = ["--config", QUICKSTART, "--workdir", str(tmp_path / "run"), "--labels", "8", *flags]
    assert main(["check", *flags]) == 1
    assert re.search(said, one_line(capsys))


@pytest.mark.whole_run
def test_a_run_writes_about_what_check_says(finished, corpus):
    """Of the files that are large: the shards of activations are of documents that may be shorter."""
    config = load_config(CONFIG, [f"--config.corpus.source={corpus}"])
    mesh = make_mesh(1, 1, 1)
    config = dataclasses.replace(config, subject=dataclasses.replace(config.subject, path=str(finished / "subject")))
    study = Study.of_shapes(config, mesh, subject_config(config, mesh))
    said = bytes_written(study, 40, True)
    size = lambda *folders: sum(
        file.stat().st_size for folder in folders for file in (finished / folder).rglob("*") if file.is_file()
    )
    params = study.boxed
    states = {"sft_av": [params[0]], "sft_ar": [params[1]], "rl": params}
    bytes_of = lambda tree: 4 * sum(x.size for x in jax.tree.leaves(tree))
    matrices = [leaf for name, leaf in params[0]["blocks"].items() if "norm" not in name]
    for name, models in states.items():  # AdamW keeps two moments, Muon one of a matrix
        state = 3 * bytes_of(models) - (bytes_of(matrices) if name == "sft_av" else 0)
        assert said[f"checkpoints of {name}"] == pytest.approx(3 * state, rel=0.01)  # two are kept, one is written
    assert size("pair/av", "pair/ar") < 1.5 * said["pairs"] / 3 + 300_000  # tokenizers are small files
    assert size("activations") < said["activations"] + 100_000


# Words instead of traces


def test_a_folder_whose_name_is_mistyped_is_not_made(corpus, tmp_path, capsys):
    assert nla_main("report", tmp_path / "typo", corpus) == 1
    assert "There is no working folder" in (said := one_line(capsys)) and "run `nla evaluate`" in said
    assert not (tmp_path / "typo").exists()
    assert main(["report", "--config", CONFIG, "--workdir", ""]) == 1
    assert "--workdir is empty" in one_line(capsys)


def test_damaged_files_of_a_run_are_named(finished, corpus, tmp_path, capsys):
    """Whatever a byte of them becomes."""
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    for name, content in {
        "summary.json": b"{",
        "stages/report.json": b"[]",
        "stages/rl.json": b'{"basis": {}, "seconds": 1, "result": 3}',
        "stages/evaluate.json": b"\xff",
    }.items():
        kept = (workdir / name).read_bytes()
        (workdir / name).write_bytes(content)
        assert nla_main("quickstart", workdir, corpus) == 1
        assert re.search(f"{name} is damaged; delete it", one_line(capsys))
        (workdir / name).write_bytes(kept)
    (workdir / "stages/report.json").unlink()
    page = (workdir / "evaluation.json").read_bytes()
    (workdir / "evaluation.json").write_bytes(page.replace(b"fve_rl", b"fve_rm", 1))
    assert nla_main("report", workdir, corpus) == 1
    assert "evaluation.json is not what `nla evaluate` wrote; delete it" in one_line(capsys)
    (workdir / "evaluation.json").unlink()
    assert nla_main("quickstart", workdir, corpus) == 0
    assert json.loads((workdir / "evaluation.json").read_bytes()) == json.loads(page)


def test_a_setting_without_its_sign_is_said_with_it(capsys):
    assert main(["rl", "--config", CONFIG, "--config.rl.steps", "5"]) == 1
    assert "Unknown argument '5' (write --config.rl.steps=5)" in one_line(capsys)


def test_the_version_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith(f"nla_jax {nla.__version__}\n")


def test_a_reader_that_has_enough_ends_the_command_quietly():
    """As in `nla settings | head -1`."""
    code = "import sys; from nla_jax.cli import main; sys.exit(main(['settings']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # else all of it may be written before the reader leaves
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE


def test_ctrl_c_while_the_process_ends_is_no_error(tmp_path):
    """JAX clears its caches then; a KeyboardInterrupt in that would print a trace behind a finished run."""
    code = (
        "import atexit, os, signal, sys; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT));"
        "from nla_jax.cli import command; sys.argv[1:] = ['settings']; command()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, b"") and b"rl.steps" in ended.stdout


@pytest.mark.parametrize("number, raised", [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_in_a_destructor_is_not_lost(number, raised, monkeypatch):
    """Python prints the exception that a handler raises there, and goes on."""

    class Unlucky:
        def __del__(self):
            signal.raise_signal(number)

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handle_unraisable()
    survived, before = False, signal.signal(signal.SIGINT, signal.default_int_handler)  # `nohup` has Ctrl-C ignored
    try:
        with sigterm_raises(), pytest.raises(raised):
            Unlucky()
            survived = True
            time.sleep(30)
    finally:
        signal.signal(signal.SIGINT, before)
    assert survived


def test_a_full_disk_is_said_with_its_cure():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file")
    assert sentence(error) == "/some/file: No space left on device; make room, and run the same command again."
    assert sentence(FileNotFoundError(errno.ENOENT, "No such file", "/x")) == "/x: No such file."


def no_corpus():
    pytest.fail("the corpus is read although the subject is not there")


def test_a_mistyped_subject_is_refused_before_the_corpus_is_read(tmp_path, capsys):
    flags = [f"--config.subject.path={tmp_path}/nowhere", "--config.corpus.source=test_check:no_corpus"]
    assert main(["extract", "--config", CONFIG, "--workdir", str(tmp_path / "run"), *flags]) == 1
    assert f"There is no model folder {tmp_path}/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "kind"), [("rl.steps=x", "a whole number"), ("rl.temperature=warm", "a number")])
def test_a_word_where_a_number_belongs(flag, kind, capsys):
    assert main(["check", "--config", CONFIG, f"--config.{flag}"]) == 1
    assert capsys.readouterr().err.rstrip().endswith(f"is not valid: --config.{flag} is not {kind}.")


def changed(file: Path) -> None:
    """Another digit in the middle of a text file: it stays what it is, and says something else."""
    content = bytearray(file.read_bytes())
    at = next(i for i in range(len(content) // 2, len(content)) if content[i : i + 1].isdigit())
    content[at] = ord("1") if content[at] != ord("1") else ord("2")
    file.write_bytes(content)


WRITTEN = [  # text files of a run
    "stages/rl.json",
    "stages/sft.json",
    "summary.json",
    "report.html",
    "evaluation.json",
    "pair/av/config.json",
    "pair/ar/nla_meta.yaml",
    "pair_warm/ar/tokenizer.json",
    "subject/tokenizer.json",
]


@pytest.mark.parametrize("name", WRITTEN)
def test_no_changed_digit_in_a_finished_run_goes_unnoticed(name, finished, corpus, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    changed(workdir / name)
    assert nla_main("quickstart", workdir, corpus) == 1
    assert re.search(f"{name} is (damaged|not what `nla .*` wrote); delete it", one_line(capsys))
    if name == "report.html":
        (workdir / name).unlink()
        assert nla_main("quickstart", workdir, corpus) == 0 and (workdir / name).exists()


def test_damaged_weights_and_prompts_of_a_run_are_named(finished, corpus, tmp_path, capsys):
    workdir = copy_before(finished, tmp_path, "sft")
    changed(workdir / "train/prompts/nla_meta.yaml")
    assert nla_main("sft", workdir, corpus) == 1
    assert "train/prompts/nla_meta.yaml is damaged; delete it" in one_line(capsys)
    workdir = copy_before(finished, tmp_path / "later", "rl")
    for name in ("av/model.safetensors", "ar/value_head.safetensors"):
        flip(workdir / "pair_warm" / name, -3)
        assert nla_main("rl", workdir, corpus) == 1
        assert f"pair_warm/{name} is damaged" in one_line(capsys)
        flip(workdir / "pair_warm" / name, -3)
    flip(workdir / "subject/model.safetensors", -3)
    (workdir / "stages/extract.json").unlink()
    shutil.rmtree(workdir / "activations")
    assert nla_main("extract", workdir, corpus) == 1
    assert "subject/model.safetensors is damaged" in one_line(capsys)


def test_damage_to_a_pair_is_found_before_it_is_copied(finished, tmp_path, capsys):
    pair = shutil.copytree(finished / "pair", tmp_path / "pair")
    av, ar = pair / "av", pair / "ar"
    flip(ar / "model.safetensors", -3)
    commands = [["export", "--pair", str(pair)], ["import", "--av", str(av), "--ar", str(ar)]]
    for command in commands:
        assert main([*command, "--out", str(tmp_path / "out")]) == 1
        assert f"{ar}/model.safetensors is damaged: its bytes are not those that were written" in one_line(capsys)
    flip(ar / "model.safetensors", -3)
    changed(av / "config.json")
    flip(
        av / "nla_meta.yaml",
        (av / "nla_meta.yaml").read_bytes().index(b"injection_scale: ") + len("injection_scale: 0."),
    )
    main([*commands[0], "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    for name in ("config.json", "nla_meta.yaml"):
        assert f"{av}/{name} has changed since it was written" in said


def test_damage_to_a_pair_is_found_before_it_explains(finished, tmp_path, capsys, monkeypatch):
    """Checksums are compared when files have changed since they were found whole, and only then."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "SETTLED_SECONDS", -1.0)
    looked, look = [], hub.check_bytes
    monkeypatch.setattr(hub, "check_bytes", lambda *folders: looked.append(folders) or look(*folders))
    subject = shutil.copytree(finished / "subject", tmp_path / "subject")
    pair = shutil.copytree(finished / "pair", tmp_path / "pair")
    for _ in range(2):
        nla.load_pair(pair)
        nla.load_subject(subject, 1)
    assert looked == [(pair / "av", pair / "ar"), (subject,)]
    for file in (pair / "av/model.safetensors", pair / "ar/value_head.safetensors", subject / "model.safetensors"):
        flip(file, -3)
        assert main(["explain", "--pair", str(pair), "--subject", str(subject), "--text", "a b"]) == 1
        assert re.search(f"{file} is damaged|not the subject that .* was trained on", one_line(capsys))
        flip(file, -3)
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        flip(subject / "model.safetensors", -3)
        nla.load_subject(subject, 1)
    for name in ("av/nla_meta.yaml", "ar/config.json", "av/chat_template.jinja"):
        file = pair / name
        kept = file.read_bytes()
        file.unlink() if name.endswith("jinja") else file.write_bytes(kept + b"\n")  # which a parser does not mind
        for _ in range(2):
            notes.note.cache_clear()
            nla.load_pair(pair)
            assert f"{file} has changed since it was written" in capsys.readouterr().err
        file.write_bytes(kept)


def test_a_mistaken_working_folder_or_marker_is_said_first(corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/below"):
        for verb in ("check", "quickstart"):
            assert nla_main(verb, tmp_path / name, corpus) == 1
            found = capsys.readouterr()
            assert f"{tmp_path}/file is a file; use another --workdir" in found.err and not found.out
    shipped = ["--config.pretrain.init_from=shipped", "--config.prompts.marker=marker"]
    assert nla_main("quickstart", tmp_path / "new", corpus, *shipped) == 1
    assert "no usable injection marker" in one_line(capsys) and not (tmp_path / "new").exists()


def test_the_marker_of_a_dataset_is_looked_at_before_anything_runs(finished, corpus, tmp_path, capsys):
    flags = [f"--config.extract.source.{split}={tmp_path}/{split}.parquet" for split in ("av_sft", "ar_sft", "rl")]
    for split in ("av_sft", "ar_sft", "rl"):
        (tmp_path / f"{split}.parquet").write_bytes(b"not looked at")
    meta = yaml.safe_load((finished / "pair/av/nla_meta.yaml").read_text())
    tokens = {name: value for name, value in meta["tokens"].items() if name.startswith("injection")}
    side = tmp_path / "av_sft.parquet.nla_meta.yaml"
    write = lambda **more: side.write_text(
        yaml.safe_dump({"tokens": tokens | more, "prompt_templates": {"av": meta["prompt_templates"]["av"]}})
    )
    flags.append(f"--config.subject.path={finished / 'subject'}")
    write(injection_token_id=5)
    assert nla_main("quickstart", tmp_path / "new", corpus, *flags) == 1
    assert f"{side}: " in (said := one_line(capsys)) and "marker" in said and not (tmp_path / "new").exists()
    write()
    other = next(char for char in "~§¤|^" if char != tokens["injection_char"])
    assert nla_main("quickstart", tmp_path / "new", corpus, *flags, f"--config.prompts.marker={other}") == 1
    assert f"was made with the marker {tokens['injection_char']!r}" in capsys.readouterr().err


def test_labels_that_need_the_tokens_are_sampled_too(subject_folder, tokenizer):
    """The check gives a labeller all that a row of a run has: one that runs the subject needs the ids."""
    settings = ["--config.label.labeller=nla_jax.labels.behaviour:Behaviour", "--config.extract.min_position=2"]
    config = load_config(CONFIG, settings)
    config = dataclasses.replace(
        config, label=dataclasses.replace(config.label, settings={"subject": str(subject_folder)})
    )
    documents = [Document(f"d{i}", text) for i, text in enumerate(SENTENCES)]
    labels = sampled_labels(config, documents, 2, tokenizer)
    assert len(labels) == 2 and all("It ends: …" in label for label in labels)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_optimizers_are_checked_on_the_parameters_that_they_train(family, rank, sidecar, tokenizer, tmp_path):
    """Their names differ between models (biases, norms, an output matrix of its own) and with adapters."""
    folder = shutil.copytree(GOLDEN / family, tmp_path / family)
    tokenizer.save_pretrained(folder)
    adapters = [f"--config.sft.{who}.lora.rank={rank}" for who in ("av", "ar")]
    config = load_config(QUICKSTART, [f"--config.subject.path={folder}", "--config.subject.layer=1", *adapters])
    lora = Lora(rank) if rank else None
    made = new_pair(dataclasses.replace(sidecar, layer=1, base_checkpoint=str(folder)), folder, adapters=(lora, lora))
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, nn.unbox(tree))
    found = {name: shapes(tree) for name, tree in trained(config).items()}
    assert found == {
        "subject": shapes(load_params(folder, read_config(folder))),
        "av": shapes(made.verbalizer_params),
        "ar": shapes(made.reconstructor_params),
    }


def test_the_optimizer_of_a_subject_that_the_hub_does_not_give_is_made_but_takes_no_step():
    config = load_config(QUICKSTART, ["--config.subject.path=nobody/nowhere"])
    assert trained(config) == {}
    check_functions(config, ["sft"])
    with pytest.raises(InputError, match="AdamW's lr is -1.0"):
        check_functions(
            load_config(QUICKSTART, ["--config.subject.path=nobody/nowhere", "--config.sft.av.optimizer.lr=-1.0"]),
            ["sft"],
        )
