"""What activations of a text say: as a script with `transformers` and PyTorch, the other side of explain_side_by_side.py.

    python experiments/benchmark/explain_pytorch.py --subject S --pair P --file text.txt --positions 63 --max-new-tokens 100

It is written as a user would write it, from a pair's folders and its `nla_meta.yaml`: the subject up to block K, the
AV with `generate(inputs_embeds=…)`, the AR with its head, all rows in one batch, greedy. Weights are in the dtype of
the files, or in `--dtype`. Prints a JSON object a row.
"""

import argparse
import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", required=True)
    parser.add_argument("--pair", type=Path, required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--positions", required=True, help="indices of tokens, such as 3,63")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    positions = [int(i) for i in arguments.positions.split(",")]
    meta = yaml.safe_load((arguments.pair / "ar" / "nla_meta.yaml").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.pair / "av")

    subject = AutoModel.from_pretrained(arguments.subject, dtype=arguments.dtype)
    subject.layers = subject.layers[: meta["extraction_layer_index"] + 1]
    subject.norm = torch.nn.Identity()
    av = AutoModelForCausalLM.from_pretrained(arguments.pair / "av", dtype=arguments.dtype)
    ar = AutoModel.from_pretrained(arguments.pair / "ar", dtype=arguments.dtype)
    ar.norm = torch.nn.Identity()
    head = load_file(arguments.pair / "ar" / "value_head.safetensors")["weight"].float()

    with torch.inference_mode():
        ids = tokenizer(arguments.file.read_text(encoding="utf-8"), return_tensors="pt").input_ids
        vectors = subject(ids).last_hidden_state[0, positions].float()
        texts, counts = explain(av, tokenizer, meta, vectors, arguments.max_new_tokens)
        recon = reconstruct(ar, head, tokenizer, meta, texts)
    cosines = torch.nn.functional.cosine_similarity(recon, vectors)
    for row in zip(positions, texts, counts, cosines.tolist()):
        names = ("position", "explanation", "new_tokens", "cosine")
        print(json.dumps(dict(zip(names, row)), ensure_ascii=False))


def explain(av, tokenizer, meta: dict, vectors: torch.Tensor, limit: int) -> tuple[list[str], list[int]]:
    """Each row's explanation, and how many tokens the AV wrote."""
    tokens = meta["tokens"]
    content = meta["prompt_templates"]["av"].replace("{injection_char}", tokens["injection_char"])
    chat = [{"role": "user", "content": content}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    (slot,) = (ids[0] == tokens["injection_token_id"]).nonzero()[:, 0].tolist()
    scale = meta["extraction"]["injection_scale"]
    embeds = av.get_input_embeddings()(ids).repeat(len(vectors), 1, 1)
    embeds[:, slot] = (torch.nn.functional.normalize(vectors, dim=-1) * scale).to(embeds.dtype)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    new = av.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts], [len(row) for row in new]


def reconstruct(ar, head: torch.Tensor, tokenizer, meta: dict, texts: list[str]) -> torch.Tensor:
    """The AR's reconstruction of each row from its text alone, float32."""
    prompts = [meta["prompt_templates"]["ar"].replace("{explanation}", text) for text in texts]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
    states = ar(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    last = batch.attention_mask.sum(1) - 1
    return states[torch.arange(len(texts)), last].float() @ head.T


if __name__ == "__main__":
    main()
