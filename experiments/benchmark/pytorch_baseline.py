"""The PyTorch side of the benchmark: one NLA RL step, one step of AV SFT, or extraction, with transformers models.

    python experiments/benchmark/pytorch_baseline.py rl --steps 5 --warmup 1
    python experiments/benchmark/pytorch_baseline.py sft_av --steps 5 --warmup 1

Written as such a step is commonly written today: `model.generate` with its KV cache, full-sequence forwards with sdpa
attention, log-probabilities from the float32 logits of the response positions only, fused AdamW. Weights are random
and tokens are ids, so neither a checkpoint nor a tokenizer is needed. Every response has the same length, so nothing
is padded. Prints one JSON line per timed step. `--interactive`: warms up, prints {"ready": true}, and then runs one
step for each line on stdin, so that another program can alternate between this side and another one.

On a CPU, start it with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ at 10000000000: otherwise glibc gives every
large tensor back to the system and pays for its pages again.
"""

import argparse
import contextlib
import copy
import json
import resource
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel


class Reconstructor(nn.Module):
    """The AR: the AV's first `layers` blocks without final norm, then a linear head, read at the last token."""

    def __init__(self, verbalizer: PreTrainedModel, layers: int):
        super().__init__()
        config = copy.deepcopy(verbalizer.config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        self.backbone = AutoModel.from_config(config)
        self.backbone.load_state_dict(verbalizer.model.state_dict(), strict=False)
        self.backbone.norm = nn.Identity()
        self.head = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        nn.init.eye_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids `[B, T]` to reconstructions `[B, D]`."""
        return self.head(self.backbone(tokens, use_cache=False).last_hidden_state[:, -1])


def normalise(x: Tensor) -> Tensor:
    """`x` at length sqrt(D), in float32."""
    return F.normalize(x.float(), dim=-1) * x.shape[-1] ** 0.5


def normalised_mse(prediction: Tensor, gold: Tensor) -> Tensor:
    """mean_D (p̂ - ĝ)² per row: the AR's loss and minus the AV's reward."""
    return (normalise(prediction) - normalise(gold)).square().mean(-1)


class Benchmark:
    """Models, optimizers and prompts; `rl_step` and `sft_av_step` each run one step and return its metrics.

    `phases` holds the seconds of each phase of the latest step."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        self.args, self.device, self.phases = args, torch.device(args.device), {}
        config = AutoConfig.for_model(
            args.family,
            vocab_size=args.vocab,
            hidden_size=args.width,
            intermediate_size=args.ffn,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            head_dim=args.head_dim,
            tie_word_embeddings=not args.untied_head,
        )
        place = {"device": self.device, "dtype": getattr(torch, args.dtype)}
        self.verbalizer = AutoModelForCausalLM.from_config(config).to(**place)
        self.verbalizer_opt = self.optimizer(self.verbalizer)
        if args.mode == "extract":
            self.subject = Reconstructor(self.verbalizer, args.ar_layers).backbone.to(**place)
            del self.verbalizer, self.verbalizer_opt
        if args.mode == "rl":
            self.reference = copy.deepcopy(self.verbalizer).requires_grad_(False)
            self.reconstructor = Reconstructor(self.verbalizer, args.ar_layers).to(**place)
            self.reconstructor_opt = self.optimizer(self.reconstructor)
        self.prompt = self.random_tokens(1, args.prefix + 1 + args.suffix)  # the marker stands at index `prefix`
        self.template_before = self.random_tokens(1, args.ar_prefix)
        self.template_after = self.random_tokens(1, args.ar_suffix)
        self.generation = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            use_cache=True,
            min_new_tokens=args.response,
            max_new_tokens=args.response,
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.args.lr, weight_decay=0.0, fused=True)

    def random_tokens(self, *shape: int) -> Tensor:
        return torch.randint(self.args.vocab, shape, device=self.device)

    def random_activations(self, n: int) -> Tensor:
        return torch.randn(n, self.args.width, device=self.device)

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Records the seconds of its block."""
        self.synchronise()
        start = time.perf_counter()
        yield
        self.synchronise()
        self.phases[name] = time.perf_counter() - start

    def embed_prompts(self, model: PreTrainedModel, activations: Tensor) -> Tensor:
        """Prompt embeddings `[B, P, D]`, the marker's replaced by `injection_scale * h / |h|`."""
        embeddings = model.get_input_embeddings()(self.prompt.expand(len(activations), -1))
        slot = self.args.injection_scale * F.normalize(activations, dim=-1)
        embeddings[:, self.args.prefix] = slot.to(embeddings.dtype)
        return embeddings

    @torch.no_grad()
    def generate(self, activations: Tensor) -> Tensor:
        """Responses `[B, R]`, sampled at temperature 1."""
        embeddings = self.embed_prompts(self.verbalizer, activations)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=self.device)
        return self.verbalizer.generate(
            inputs_embeds=embeddings, attention_mask=mask, generation_config=self.generation
        )

    def log_probs(self, model: PreTrainedModel, activations: Tensor, responses: Tensor) -> Tensor:
        """Log-probabilities `[B, R]` of the response tokens."""
        read = model.get_input_embeddings()(responses[:, :-1])
        embeddings = torch.cat([self.embed_prompts(model, activations), read], dim=1)
        logits = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=responses.shape[1]).logits.float()
        return -F.cross_entropy(logits.flatten(0, 1), responses.flatten(), reduction="none").view_as(responses)

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        """Backward, clip to norm 1, one optimizer step; returns the gradient's norm before clipping."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def rl_step(self) -> dict[str, Tensor]:
        """One rollout of `activations * group` samples and one optimizer step on each of AV and AR."""
        args = self.args
        activations = self.random_activations(args.activations).repeat_interleave(args.group, dim=0)

        with self.phase("generate"):
            responses = self.generate(activations)

        old = None
        if args.old_logprobs:
            with self.phase("old"), torch.no_grad():
                old = self.log_probs(self.verbalizer, activations, responses)

        with self.phase("reference"), torch.no_grad():
            reference = self.log_probs(self.reference, activations, responses)

        with self.phase("reward"), torch.no_grad():
            before, after = (part.expand(len(responses), -1) for part in (self.template_before, self.template_after))
            texts = torch.cat([before, responses, after], dim=1)
            rewards = -normalised_mse(self.reconstructor(texts), activations)
            groups = rewards.view(-1, args.group)
            centred = groups - groups.mean(1, keepdim=True)
            advantages = (centred / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)

        with self.phase("av_update"):
            logp = self.log_probs(self.verbalizer, activations, responses)
            if old is None:
                policy_loss = -advantages * logp
            else:
                ratio = (logp - old).exp()
                clipped = ratio.clamp(1 - args.clip_ratio, 1 + args.clip_ratio)
                policy_loss = -torch.minimum(ratio * advantages, clipped * advantages)
            difference = (reference - logp).clamp(-10, 10)
            kl = difference.exp() - difference - 1  # the k3 estimator
            loss = (policy_loss + args.kl_coefficient * kl).mean()
            av_grad_norm = self.update(self.verbalizer, self.verbalizer_opt, loss)

        with self.phase("ar_update"):
            mse = normalised_mse(self.reconstructor(texts), activations).mean()
            ar_grad_norm = self.update(self.reconstructor, self.reconstructor_opt, mse)

        return {"reward": rewards.mean(), "kl": kl.mean(), "av_grad_norm": av_grad_norm, "ar_grad_norm": ar_grad_norm}

    def sft_av_step(self) -> dict[str, Tensor]:
        """One step of the AV's supervised warm start: cross-entropy on the response."""
        activations = self.random_activations(self.args.batch)
        responses = self.random_tokens(self.args.batch, self.args.sft_response)
        with self.phase("av_update"):
            loss = -self.log_probs(self.verbalizer, activations, responses).mean()
            norm = self.update(self.verbalizer, self.verbalizer_opt, loss)
        return {"loss": loss, "av_grad_norm": norm}

    @torch.no_grad()
    def extract_step(self) -> dict[str, Tensor]:
        """Activations after the last block at `positions` of each document, evenly spread, in float32."""
        a = self.args
        chosen = torch.linspace(0, a.document - 1, min(a.positions, a.document)).long()
        with self.phase("forward"):
            states = self.subject(self.random_tokens(a.documents, a.document), use_cache=False).last_hidden_state
            vectors = states[:, chosen].float().cpu()
        return {"norm": vectors.norm(dim=-1).mean()}

    def peak_memory(self) -> int:
        """Bytes: the process's largest resident set, on a GPU the most that was allocated there."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

    def timed_step(self) -> dict:
        """Runs one step and describes it."""
        step, samples = self.sft_av_step, self.args.batch
        if self.args.mode == "extract":
            step, samples = self.extract_step, self.args.documents
        if self.args.mode == "rl":
            step, samples = self.rl_step, self.args.activations * self.args.group
        self.synchronise()
        start = time.perf_counter()
        metrics = step()
        self.synchronise()
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "phases": dict(self.phases),
            "samples_per_second": samples / seconds,
            "peak_memory_bytes": self.peak_memory(),
            "metrics": {name: value.item() for name, value in metrics.items()},
        }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["rl", "sft_av", "extract"])
    run = parser.add_argument_group("run")
    run.add_argument("--steps", type=int, default=5, help="timed steps (ignored with --interactive)")
    run.add_argument("--warmup", type=int, default=1, help="steps before the timed ones")
    run.add_argument("--interactive", action="store_true", help="one step for each line on stdin")
    run.add_argument("--threads", type=int, default=2)
    run.add_argument("--device", default="cpu")
    run.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights and compute")
    run.add_argument("--seed", type=int, default=0)
    settings = {
        "model": {
            "family": "qwen2",
            "vocab": 4096,
            "width": 256,
            "ffn": 704,
            "layers": 6,
            "heads": 8,
            "kv_heads": 2,
            "head_dim": 32,
            "ar_layers": 5,
        },
        "prompt": {"prefix": 100, "suffix": 24, "ar_prefix": 8, "ar_suffix": 5, "injection_scale": 10.0},
        "rl": {"activations": 8, "group": 8, "response": 64, "kl_coefficient": 0.01, "clip_ratio": 0.2},
        "sft_av": {"batch": 64, "sft_response": 122},
        "extract": {"documents": 16, "document": 512, "positions": 8},
        "optimizer": {"lr": 1.41e-5},
    }
    for title, defaults in settings.items():
        group = parser.add_argument_group(title)
        for name, default in defaults.items():
            group.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{default}")
    parser.add_argument("--untied-head", action="store_true", help="output head with weights of its own")
    parser.add_argument("--no-old-logprobs", dest="old_logprobs", action="store_false", help="on-policy gradient")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    benchmark = Benchmark(args)
    for _ in range(args.warmup):
        benchmark.timed_step()
    if args.interactive:
        print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin if args.interactive else range(args.steps):
        print(json.dumps(benchmark.timed_step()), flush=True)


if __name__ == "__main__":
    main()
