"""`nla plan`: what a config needs on a TPU slice, from its programs compiled without one."""

import argparse
import contextlib
import json

from nla_jax.verbs.stages import add_workdir, workdir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The devices to plan for, which programs, and how the plan is printed."""
    add_workdir(parser)
    parser.add_argument("--topology", help="a TPU slice such as v5p:4x4x4 or v6e:4x4 (default: the devices present)")
    parser.add_argument("--mesh", type=mesh_sizes, help="data,fsdp,tensor; one may be -1 (default: the config's)")
    parser.add_argument(
        "--programs",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="plan only these, e.g. rollout,joint_step",
    )
    parser.add_argument("--search", action="store_true", help="try meshes and micro-batches, rank those that fit")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def mesh_sizes(text: str) -> tuple[int, ...]:
    """`data,fsdp,tensor` of the command line."""
    with contextlib.suppress(ValueError):
        if len(sizes := tuple(int(n) for n in text.split(","))) == 3:
            return sizes
    raise argparse.ArgumentTypeError("must be three numbers: data,fsdp,tensor")


def run(arguments: argparse.Namespace) -> None:
    """Prints what the config's programs would need of memory and time; with `--search` on every mesh, best first."""
    from nla_jax.io.files import stand_in
    from nla_jax.models.sharding import AXES, make_mesh
    from nla_jax.tools.plan import plan, table
    from nla_jax.tools.precision import in_dtype, settled
    from nla_jax.tools.search import ranking, search
    from nla_jax.tools.topology import mesh_over, present, slice_named

    # Chips that are named, not here, are accelerators.
    config = in_dtype(arguments.config, "bfloat16") if arguments.topology else settled(arguments.config)
    place = slice_named(arguments.topology) if arguments.topology else present(config.compute.dtype)
    if arguments.search:
        result, words = search(config, place, stand_in(workdir(arguments)) / "plan.jsonl"), ranking
    else:
        sizes = arguments.mesh or tuple(getattr(config.mesh, axis) for axis in AXES)
        mesh = mesh_over(place.devices, sizes) if arguments.topology else make_mesh(*sizes)
        result, words = plan(config, place, mesh, arguments.programs), table
    print(json.dumps(result, indent=1) if arguments.json else words(result))
