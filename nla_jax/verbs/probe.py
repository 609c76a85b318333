"""`nla probe`: probes of a finished run's pair without its evaluation, or of anybody's pair on texts."""

import argparse
from collections.abc import Iterable, Iterator

from nla_jax.io.files import AnyPath, path_to
from nla_jax.runtime.environment import import_transformers_alone
from nla_jax.runtime.errors import InputError
from nla_jax.verbs.conventions import add_conventions, given_conventions
from nla_jax.verbs.explain import check_numbers
from nla_jax.verbs.judge import add_judge, given_judge, show_cost

OF_TEXTS = {  # what only a pair on texts is asked for, with its default; a run's config says these of a run
    "subject": None,
    "texts": None,
    "max_tokens": 2048,
    "max_new_tokens": 200,
    "temperature": 0.0,
    "seed": 0,
    "batch": 64,
    "dtype": None,
}
CONVENTIONS = ("injection", "injection_block", "injection_scale", "ar_bos", "thinking", "reading")
ROWS = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, or a pair with texts; which probes; and where results go."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="a run: its pair, held-out rows and settings")
    source.add_argument("--pair", help="folder with av/ and ar/, a hub id, or quickstart; probed on --texts")
    parser.add_argument(
        "--probes",
        help="import paths, package.module:name, with commas between them (default: those of the run's config)",
    )
    parser.add_argument(
        "--rows", type=int, help=f"activations, spread evenly over documents (default: the run's, or {ROWS})"
    )
    parser.add_argument("--out", help="folder for NAME.parquet and NAME.json of each probe (default: WORKDIR/probes)")
    add_judge(parser)
    texts = parser.add_argument_group("of a pair on texts", "A run has these in its config.")
    texts.add_argument("--texts", nargs="+", help=".txt, .jsonl or .parquet files, or folders of them: the documents")
    texts.add_argument("--subject", help="the subject's folder or hub id (default: what the pair's sidecar names)")
    texts.add_argument("--max-tokens", type=int, help="tokens of a document that are read (default 2048)")
    texts.add_argument("--max-new-tokens", type=int, help="where an explanation is cut (default 200)")
    texts.add_argument("--temperature", type=float, help="of sampling (default 0: greedy)")
    texts.add_argument("--seed", type=int, help="of positions and sampling (default 0)")
    texts.add_argument("--batch", type=int, help="explanations that are sampled at a time (default 64)")
    texts.add_argument("--dtype", help="dtype of weights and computation (default: that of the files)")
    add_conventions(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints a table of the scores, and writes those of each row."""
    from nla_jax.runtime.user_input import whole_number

    if arguments.rows is not None:
        whole_number("--rows", arguments.rows, 2)
    if arguments.workdir is not None:
        of_run(arguments)
    else:
        of_pair(arguments)


def of_run(arguments: argparse.Namespace) -> None:
    """The probes of a finished run."""
    import dataclasses

    from nla_jax.config import read
    from nla_jax.io.folders import load_tokenizer
    from nla_jax.io.hub import locate
    from nla_jax.probes.probe import asks, by_needs, chosen_probes, load_probes, there
    from nla_jax.runtime.compiler import enable_compile_cache, optimize
    from nla_jax.runtime.run import Run, read_json
    from nla_jax.stages.evaluate import RunContext
    from nla_jax.stages.table import STAGES
    from nla_jax.tools.probe import measured

    if given := [name for name in (*OF_TEXTS, *CONVENTIONS) if getattr(arguments, name) is not None]:
        raise InputError(
            f"--{given[0].replace('_', '-')} belongs to --pair; of a run its config says it: leave it out."
        )
    folder = path_to(arguments.workdir)
    file = folder / "config.json"
    if not arguments.workdir or not file.exists():
        raise InputError(
            f"{arguments.workdir or '--workdir'} is no working folder of a run (it has no config.json); name one in which "
            f"`nla rl` has finished."
        )
    config = read(read_json(file, {}, "copy it from config.json of a run with the same settings"), str(file))
    if arguments.rows is not None:
        config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, rows=arguments.rows))
    provider = given_judge(arguments, config.evaluate.provider)
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, provider=provider))
    named, usual = chosen(arguments.probes), provider.probes if arguments.judge else chosen_probes(config.evaluate)
    probes = load_probes(named, "--probes") if named else load_probes(usual)
    able, lacking = by_needs(probes, there(config.evaluate))
    enable_compile_cache()
    optimize(config.compute.optimize)
    study = Run(config, folder, STAGES, arguments.command)
    study.require("rl")
    out = path_to(arguments.out) if arguments.out else folder / "probes"
    with study.alone():
        context = RunContext(study)
        if arguments.dry_run:
            answers = study.workdir / "evaluation" / "answers"
            show_cost(context, able, provider, answers, lambda: load_tokenizer(locate(study.subject_folder)))
            return
        if any(asks(one) for _, one in able):
            context.provider.ready()
        show(measured(context, able, out), lacking, out)


def of_pair(arguments: argparse.Namespace) -> None:
    """The probes of any pair, of which nothing but the pair is known, on the activations of texts."""
    for name, value in OF_TEXTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    check_numbers(arguments)
    if not arguments.texts:
        raise InputError("--pair needs --texts: files with the documents on whose activations the pair is probed.")
    if not (arguments.injection or arguments.probes):  # which may be functions of the user's
        import_transformers_alone()
    from nla_jax.config import Evaluate
    from nla_jax.config import Provider as Settings
    from nla_jax.io.pairs import place_of
    from nla_jax.pair import load_pair
    from nla_jax.probes.probe import by_needs, load_probes
    from nla_jax.probes.provider import provider_of
    from nla_jax.runtime.compiler import enable_compile_cache
    from nla_jax.tools.explain import Sampling, subject_of
    from nla_jax.tools.probe import PairContext, activations_of, measured, there

    documents = read_documents(arguments.texts)
    settings = given_judge(arguments, Settings())
    usual = settings.probes if settings.kind else Evaluate().probes
    able, lacking = by_needs(load_probes(chosen(arguments.probes) or usual, "--probes"), there(settings.kind))
    if settings.kind and not arguments.out:
        raise InputError("--judge needs --out: a folder that keeps its answers, so that none is paid for twice.")
    out = path_to(arguments.out) if arguments.out else None
    provider = provider_of(settings, out / "answers") if settings.kind else None
    if provider and not arguments.dry_run:
        provider.ready()
    enable_compile_cache()
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.seed, arguments.batch)
    conventions = given_conventions(arguments)
    pair = load_pair(arguments.pair, dtype=arguments.dtype, base=arguments.subject, conventions=conventions)
    subject = subject_of(pair, place_of(arguments.pair), arguments.subject, arguments.dtype)
    rows = ROWS if arguments.rows is None else arguments.rows
    activations = activations_of(subject, documents, rows, arguments.max_tokens, arguments.seed)
    context = PairContext(pair, subject, activations, sampling, provider)
    if arguments.dry_run:
        show_cost(context, able, settings, out / "answers", lambda: pair.prompts.tokenizer)
        return
    show(measured(context, able, out), lacking, out)


def chosen(given: str | None) -> list[str]:
    """The import paths on the command line."""
    return [path.strip() for path in (given or "").split(",") if path.strip()]


def read_documents(names: list[str]) -> list:
    """The documents of some files. Their ids begin with the file's name where there are several."""
    from nla_jax.data.corpus import load_corpus
    from nla_jax.io.files import cache_folder

    found = {name: load_corpus(name, data_dir=cache_folder() / "corpora") for name in dict.fromkeys(names)}
    if len(found) == 1:
        return list(*found.values())
    return [document._replace(id=f"{name}:{document.id}") for name, of in found.items() for document in of]


def show(found: Iterable, lacking: dict[str, str], out: AnyPath | None) -> None:
    """Prints what each probe has found as soon as it has, then which were left out and where the rows are."""
    from nla_jax.probes.probe import ASKS, WHO_ASKS
    from nla_jax.runtime.distributed import is_writer

    silent = []
    for measurement in found:
        if is_writer():
            print("\n".join(lines(measurement.figures, measurement.seconds)), flush=True)
        silent += [measurement.probe.name] * (not measurement.figures["scores"])
    if not is_writer():
        return
    for name in silent:
        print(f"left out: {name} (it has nothing to say here)")
    for name, needs in lacking.items():
        print(f"left out: {name} (it needs {needs})")
    if any(ask in needs for needs in lacking.values() for ask in ASKS):
        print(f"({WHO_ASKS})")
    if out:
        print(f"Rows and intervals: {out}")


def lines(figures: dict, seconds: float) -> Iterator[str]:
    """The table of one probe: score, mean, 95 % interval; and the seconds that it took."""
    from nla_jax.tools.report.pieces import interval, written

    if not figures["scores"]:
        return
    unit = figures["unit"]
    measured = f"{figures['axis'] or 'score'}; {unit}; mean, 95 % interval"
    yield f"{figures['name']}: {figures['title']} ({measured}), {seconds:.1f} s"
    for score in figures["scores"]:
        yield f"  {score['label']:<48}  {written(score['mean'], unit):>9}  {interval(score['ci95'], unit)}"
    yield from (f"  {sentence}" for sentence in figures.get("answers", ()))
