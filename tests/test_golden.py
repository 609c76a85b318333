"""`nla accept`, on dumps in the reference's form that a torch implementation of a tiny pair makes."""

import json
import shutil

import numpy as np
import pytest
import transformers
import yaml
from conftest import TINY, one_line, random_params
from safetensors.numpy import load_file, save_file

from nla_jax.cli import main
from nla_jax.io.folders import save_model
from nla_jax.io.heads import HEAD
from nla_jax.sidecar import FILE
from nla_jax.tools.golden import read_dump

torch = pytest.importorskip("torch")

REPLY = "The river turns north.\n\nShe wrote 'both' numbers."
LINE = "─" * 80


def hidden(folder, ids, layer):
    """The residual stream after block `layer`, [T, d]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    states = []
    model.model.layers[layer].register_forward_hook(
        lambda _, __, out: states.append((out[0] if isinstance(out, tuple) else out)[0])
    )
    with torch.no_grad():
        model(torch.tensor([ids]))
    return states[0]


def greedy(model, prompt, at, vector, scale, end):
    embeds = model.get_input_embeddings()(torch.tensor(prompt)).detach().clone()
    embeds[at] = vector / vector.norm() * scale
    return model.generate(
        inputs_embeds=embeds[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=200,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )[0].tolist()


@pytest.fixture(scope="module")
def place(pair, subject_folder, tmp_path_factory):
    """A pair in the reference's form, its subject, and a dump."""
    folder = tmp_path_factory.mktemp("golden")
    pair.save(folder)
    shutil.copytree(subject_folder, folder / "subject")
    for role in ("av", "ar"):
        content = yaml.safe_load((folder / role / FILE).read_text(encoding="utf-8"))
        for ours in ("conventions", "prompt_ids"):
            del content[ours]
        content["extraction"] = {"injection_scale": 20.0, "layer_index": 1}
        content.pop("critic", None)
        (folder / role / FILE).write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "av")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What of the mill?"}], tokenize=False, add_generation_prompt=True
    )
    plain = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    before = plain(prompt)
    ids = [*before, *plain(REPLY), end]
    states = hidden(folder / "subject", ids, pair.sidecar.layer)
    av = transformers.AutoModelForCausalLM.from_pretrained(folder / "av").eval()
    head = torch.tensor(load_file(folder / "ar" / HEAD)["weight"])
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Explain this: ㈎"}], tokenize=False, add_generation_prompt=True
    )
    shown, rows = plain(shown), []
    for i, state in enumerate(states):
        said = tokenizer.decode(
            greedy(av, shown, shown.index(pair.sidecar.marker.id), state, 20.0, end), skip_special_tokens=True
        )
        said = said.removeprefix("<explanation>").removesuffix("</explanation>").strip()
        read = hidden(folder / "ar", tokenizer(f"<text>{said}</text><summary>").input_ids, -1)[-1]
        cos = torch.nn.functional.cosine_similarity(torch.nn.functional.linear(read, head), state, dim=0).item()
        kind = "PROMPT" if i < len(before) else "REPLY "
        rows.append(
            f"[{i:3d}]  {kind}  token={tokenizer.decode([ids[i]])!r}  ||v||={state.norm().item():.1f}  "
            f"mse_nrm={2 - 2 * cos:.3f}  cos={cos:.3f}  fve_nrm={1 - (2 - 2 * cos) / 0.7:.3f}\n"
            + "\n".join(f"    {line}" for line in said.split("\n"))
            + "\n"
        )
    (folder / "dump.txt").write_text(
        f"NLA — WORKED EXAMPLE\n\nExtraction:        layer 1 residual stream (= HF hidden_states[2])\n"
        f"d_model:           {TINY.width}\nfve_nrm:           1 - mse_nrm / 0.7. Denominator is Var(v_nrm).\n\n{LINE}\n"
        f"After apply_chat_template(add_generation_prompt=True):\n  {prompt!r}\n\nTokenized: {len(before)} tokens\n\n{LINE}\n"
        f"2. BASE MODEL REPLY (temp=0)\n{LINE}\n\n  {REPLY!r}\n\n{LINE}\n3. PER-TOKEN NLA INFERENCE\n{LINE}\n\n"
        + "\n".join(rows)
        + "\n─── Summary ───\n  mse_nrm:  mean=0.2\n",
        encoding="utf-8",
    )
    return folder


def run(place, dump=None, **folders):
    folders = {role: str(folders.get(role, place / role)) for role in ("av", "ar", "subject")}
    flags = [f"--{name}={value}" for name, value in folders.items()]
    return main(["accept", *flags, "--dump", str(dump or place / "dump.txt"), "--rows", "4"])


def test_a_pair_does_what_its_dump_says(place, capsys):
    dump = read_dump(place / "dump.txt")
    assert (dump.layer, dump.width, dump.variance, dump.reply) == (1, TINY.width, 0.7, REPLY)
    assert len(dump.tokens) == len(dump.norms) == len(dump.texts) and any(dump.texts)
    assert run(place) == 0
    out = capsys.readouterr().out
    assert out.count("ok ") == 3 and "NOT" not in out and "The pair does what" in out


def test_another_ar_av_or_subject_is_found_out(place, tokenizer, tmp_path, capsys):
    save_model(tmp_path / "subject", random_params(TINY, 5), TINY, tokenizer)
    shutil.copytree(place / "ar", tmp_path / "ar")
    save_file({"weight": np.eye(TINY.width, dtype=np.float32)}, tmp_path / "ar" / HEAD)
    for role, message in (("subject", "extraction: norms"), ("ar", "AR: mse of the dump's texts")):
        assert run(place, **{role: tmp_path / role}) == 1
        assert message in one_line(capsys)


def test_layer_one_too_early_is_found_out(place, tmp_path, capsys):
    """The reference's README takes `hidden_states[K]`, one block too early: norms show it."""
    text = (place / "dump.txt").read_text(encoding="utf-8")
    changed = json.loads(json.dumps(text)).replace("||v||=", "||v||=1")
    (tmp_path / "dump.txt").write_text(changed, encoding="utf-8")
    assert run(place, tmp_path / "dump.txt") == 1
    out, err = capsys.readouterr()
    assert "NOT ok  extraction: norms" in out and "extraction: norms" in err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layer 1 residual", "layer 2 residual", "The dump is of layer 2 and width 32, the pair of layer 1"),
        ("token='The'", "token='A'", "has 'The' where the dump has 'A'"),
        ("[  0]", "(  0)", "has '"),
        ("d_model:", "width:", "is no golden dump"),
    ],
)
def test_other_dumps_get_one_sentence(place, tmp_path, capsys, old, new, message):
    text = (place / "dump.txt").read_text(encoding="utf-8")
    if old == "token='The'" and old not in text:
        old, new, message = "token='<|bos|>'", "token='x'", "has '<|bos|>' where the dump has 'x'"
    assert old in text
    (tmp_path / "dump.txt").write_text(text.replace(old, new, 1), encoding="utf-8")
    assert run(place, tmp_path / "dump.txt") == 1
    assert message in one_line(capsys)
