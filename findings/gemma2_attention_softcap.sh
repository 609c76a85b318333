#!/usr/bin/env bash
# Gemma 2 caps the scores of its attention (attn_logit_softcapping). transformers 5.20.0, loading a Gemma 2 model the usual
# way, chooses the sdpa kernel, which knows no cap, and leaves it out without a word: the logits are those of another model.
# With attn_implementation="eager" the cap is there; transformers 5.23.0 applies it either way.
# Guess: a field of config.json that changes the numbers is applied whichever kernel computes attention, or refused.
# Seen 2026-11-28 with torch 2.13.0 on CPU; exits non-zero where either release behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PY'
import torch, transformers
from transformers import Gemma2Config, Gemma2ForCausalLM

torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.5, query_pre_attn_scalar=8, initializer_range=1.0,
)
ids = torch.arange(1, 21)[None]
weights = Gemma2ForCausalLM(config).state_dict()


def logits(kernel, cap):
    config.attn_logit_softcapping = cap
    options = {} if kernel is None else {"attn_implementation": kernel}
    model = Gemma2ForCausalLM._from_config(config, **options).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(ids).logits, model.config._attn_implementation


usual, kernel = logits(None, 0.5)
capped, _ = logits("eager", 0.5)
bare, _ = logits("eager", None)
away = lambda other: (usual - other).abs().max().item()
print(f"transformers {transformers.__version__}: kernel {kernel}; from eager with cap {away(capped):.2g}, without {away(bare):.2g}")
PY
for version in 5.20.0 5.23.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "transformers==$version" torch==2.13.0 numpy
  "$folder/$version/bin/python" "$folder/probe.py" | tee -a "$folder/seen"
done
grep -q "5.20.0: kernel sdpa; from eager with cap [1-9]" "$folder/seen"
grep -q "5.23.0: kernel eager; from eager with cap 0," "$folder/seen"
echo "as found"
