"""The stages of a study, in the order of `nla quickstart`. To add one, write `(Run) -> None` and list it here."""

from nla_jax.runtime.run import Stage

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="pretrain",
            help="train (or measure) the subject",
            run="nla_jax.stages.pretrain:pretrain",
            needs=None,
            reads=("seed", "corpus", "split", "pretrain"),
            makes=("subject",),
            leaves=("train/pretrain/checkpoints/*",),
        ),
        Stage(
            name="extract",
            help="activations of the corpus, or of files given",
            run="nla_jax.stages.extract:extract",
            needs="pretrain",
            reads=("seed", "compute", "corpus", "split", "subject", "extract"),
            makes=("activations/*.parquet",),
            leaves=("activations/*.parquet",),
        ),
        Stage(
            name="label",
            help="explanations for the warm start",
            run="nla_jax.stages.label:label",
            needs="extract",
            reads=("label",),
            makes=("labels/*.parquet",),
            leaves=("labels/*.parquet", "labels/cache/*.jsonl"),
        ),
        Stage(
            name="sft",
            help="supervised warm start of AV and AR",
            run="nla_jax.stages.sft:sft",
            needs="label",
            reads=("prompts", "sft"),
            makes=("pair_warm/av", "pair_warm/ar"),
            leaves=("train/sft_av/checkpoints/*", "train/sft_ar/checkpoints/*"),
        ),
        Stage(
            name="rl",
            help="joint training",
            run="nla_jax.stages.rl:rl",
            needs="sft",
            reads=("rl",),
            makes=("pair/av", "pair/ar"),
            leaves=("train/rl/checkpoints/*",),
        ),
        Stage(
            name="evaluate",
            help="held-out FVE and its controls",
            run="nla_jax.stages.evaluate:evaluate",
            needs="rl",
            reads=("evaluate",),
            makes=("evaluation.json",),
        ),
        Stage(
            name="report",
            help="summary.json and report.html",
            run="nla_jax.stages.report:report",
            needs="evaluate",
            reads=("report",),
            makes=("summary.json", "report.html"),
        ),
    )
}
