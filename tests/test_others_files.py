"""Files of others, read as they mean it and written so that others read them: tokenizers, PEFT adapters, heads."""

import json

import jax
import numpy as np
import pytest
import transformers
from conftest import SENTENCES, TINY, close, one_sentence, random_params
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nla_jax.io.adapters import CONFIG, WEIGHTS, load_adapter, save_adapter
from nla_jax.io.folders import is_wrapped, load_params, load_tokenizer, read_config, save_model, save_tokenizer
from nla_jax.io.heads import HEAD, read_head, write_head
from nla_jax.models.lora import Lora
from nla_jax.models.transformer import Transformer
from nla_jax.runtime.errors import InputError
from nla_jax.subject import extract, load_subject

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

IDS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9))


# Tokenizers


def own_tokenizer(folder):
    """A llama folder's tokenizer.json that splits at spaces alone, with the class name of another family's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*SENTENCES, "2026 2026 2026 1999 1999"] * 3, trainer)
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    end = "<|endoftext|>"
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": end, "eos_token": end, "unk_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return made


def test_text_is_cut_as_tokenizer_json_says(tmp_path):
    """SmolLM2's folder is such a case: model_type llama, GPT2Tokenizer, a way of its own to split."""
    stored = own_tokenizer(tmp_path / "theirs")
    texts = ["At the sea.", "the margin.", "It's  left. 2026"]
    expected = [stored.encode(text).ids for text in texts]
    stored.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    assert expected != [stored.encode(text).ids for text in texts]  # GPT-2's way to split is another
    tokenizer = load_tokenizer(tmp_path / "theirs")
    assert tokenizer(texts, add_special_tokens=False).input_ids == expected
    assert (tokenizer.eos_token, tokenizer.bos_token_id) == ("<|endoftext|>", 0)
    (tmp_path / "ours").mkdir()
    save_tokenizer(tokenizer, tmp_path / "ours")
    (tmp_path / "ours/config.json").write_text(json.dumps({"model_type": "llama"}))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again(texts, add_special_tokens=False).input_ids == expected
    assert load_tokenizer(tmp_path / "ours")(texts, add_special_tokens=False).input_ids == expected


def test_no_second_bos_in_a_chats_rendered_text(subject_folder):
    subject = load_subject(subject_folder, 1)
    chat = subject.tokenizer.apply_chat_template([{"role": "user", "content": "A mill."}], tokenize=False)
    assert chat.startswith("<|bos|>")
    found, plain = extract(subject, [chat]), extract(subject, ["A mill."])
    assert found.token_ids[0][0] == plain.token_ids[0][0] == subject.tokenizer.bos_token_id
    assert found.token_ids[0].count(subject.tokenizer.bos_token_id) == 1


# Adapters


def torch_gemma(folder):
    """A tiny Gemma 3 as 4B and larger ones are: text model and vision tower in one."""
    text = transformers.Gemma3TextConfig(
        vocab_size=TINY.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=6,
    )
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=319
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return model


def lively(tree):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.2, tree)


def our_logits(folder, lora, adapter):
    config = read_config(folder)
    params = lora.attach(load_params(folder, config), adapter)
    return Transformer(config).apply({"params": params}, IDS, method="next_token_logits")


def their_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*language_model.*\.(q_proj|down_proj)"])
def test_adapters_of_a_multimodal_gemma_are_read(tmp_path, targets):
    model = torch_gemma(tmp_path / "base")
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)).eval()
    torch.manual_seed(1)
    for name, value in made.named_parameters():
        if "lora_B" in name:
            value.data = torch.randn_like(value) * 0.3
    made.save_pretrained(tmp_path / "adapter")
    lora, adapter = load_adapter(tmp_path / "adapter", read_config(tmp_path / "base"))
    close(our_logits(tmp_path / "base", lora, adapter), their_logits(made), 1e-4)
    assert np.abs(their_logits(made) - their_logits(torch_gemma(tmp_path / "base"))).max() > 0.1


def test_adapters_of_a_multimodal_gemma_are_written(tmp_path):
    """PEFT loads them and they have their effect; none goes into the vision tower."""
    model = torch_gemma(tmp_path / "base")
    plain = their_logits(model)
    config, lora = read_config(tmp_path / "base"), Lora(2, 4.0, targets=("q", "down"))
    adapter = lively(lora.init_params(jax.random.key(0), config))
    (tmp_path / "adapter").mkdir()
    assert is_wrapped(tmp_path / "base")
    save_adapter(tmp_path / "adapter", adapter, lora, config, str(tmp_path / "base"), wrapped=True)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    close(their_logits(loaded), our_logits(tmp_path / "base", lora, adapter), 1e-4)
    assert np.abs(their_logits(loaded) - plain).max() > 0.1
    assert not [name for name, _ in loaded.named_parameters() if "vision" in name and "lora" in name]
    again, back = load_adapter(tmp_path / "adapter", config)
    assert again == lora
    close(back, adapter, 0)


@pytest.mark.parametrize("layers", [[1], [0, 2], 1])
def test_adapters_of_some_layers_are_read(subject_folder, tmp_path, layers):
    model = transformers.AutoModelForCausalLM.from_pretrained(subject_folder)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], layers_to_transform=layers)
    made = peft.get_peft_model(model, settings).eval()
    torch.manual_seed(1)
    for name, value in made.named_parameters():
        if "lora_B" in name:
            value.data = torch.randn_like(value) * 0.3
    made.save_pretrained(tmp_path)
    lora, adapter = load_adapter(tmp_path, TINY)
    close(our_logits(subject_folder, lora, adapter), their_logits(made), 1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base model too"),
        ({"init_lora_weights": "olora"}, "'olora' changes the base model too"),
        ({"init_lora_weights": "loftq"}, "merge_and_unload"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens = \[1, 2\] is not supported; merge"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config = .* is not supported; merge"),
        ({"use_dora": True}, "use_dora = True is not supported; merge"),
    ],
)
def test_adapters_that_are_not_w_plus_ba_are_refused(tmp_path, settings, message):
    lora = Lora(2)
    save_adapter(tmp_path, lively(lora.init_params(jax.random.key(0), TINY)), lora, TINY, "base")
    content = json.loads((tmp_path / CONFIG).read_text()) | settings
    (tmp_path / CONFIG).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        load_adapter(tmp_path, TINY)
    one_sentence(error)


@pytest.mark.parametrize("initial", [True, "gaussian", "orthogonal"])
def test_other_initialisations_are_read(subject_folder, tmp_path, initial):
    model = transformers.AutoModelForCausalLM.from_pretrained(subject_folder)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=initial)
    made = peft.get_peft_model(model, settings).eval()
    made.save_pretrained(tmp_path)
    lora, adapter = load_adapter(tmp_path, TINY)
    close(our_logits(subject_folder, lora, adapter), their_logits(made), 1e-4)


def test_a_broken_adapter_is_not_written(tmp_path):
    lora = Lora(2)
    adapter = lively(lora.init_params(jax.random.key(0), TINY))
    adapter["blocks"]["q"]["lora_a"][0] = np.nan
    with pytest.raises(InputError, match="q_proj.lora_A.weight' holds NaN .* not saved") as error:
        save_adapter(tmp_path, adapter, lora, TINY, "base")
    one_sentence(error)
    assert not (tmp_path / WEIGHTS).exists()


# Heads and weights


def test_a_transposed_head_is_written_as_it_is(tmp_path):
    """safetensors 0.8 scrambles arrays that do not lie in memory row by row."""
    head = np.arange(9, dtype=np.float32).reshape(3, 3).T
    assert not head.flags.c_contiguous
    write_head(tmp_path / HEAD, head)
    np.testing.assert_array_equal(load_file(tmp_path / HEAD)["weight"], head.T)
    np.testing.assert_array_equal(read_head(tmp_path, 3, 3), head)


def test_a_head_with_a_bias_is_refused(tmp_path):
    save_file({"weight": np.eye(3, dtype=np.float32), "bias": np.ones(3, np.float32)}, tmp_path / HEAD)
    with pytest.raises(InputError, match=r"more than the tensor 'weight' \('bias' of shape \(3,\)") as error:
        read_head(tmp_path, 3, 3)
    one_sentence(error)


def test_weights_that_float16_does_not_hold_are_not_written(tmp_path, tokenizer):
    params = random_params(TINY)
    params["embedding"][3, 3] = 1e6
    with pytest.raises(
        InputError, match="'model.embed_tokens.weight' holds NaN or infinite values in float16"
    ) as error:
        save_model(tmp_path / "out", params, TINY, tokenizer, dtype="float16")
    one_sentence(error)
    assert not (tmp_path / "out").exists()
    save_model(tmp_path / "out", params, TINY, tokenizer, dtype="bfloat16")
