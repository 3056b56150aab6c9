"""``slimtron-distill export``: the student of a training checkpoint as a model."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write the student of an unfinished run's checkpoint as a model"
EPILOG = """\
examples:
  slimtron-distill export distilled --to hf:distilled-so-far
  slimtron-distill export distilled --step 200 --to megatron:step-200 --dtype bfloat16

A finished run has written its student already; `slimtron-common convert` writes it as another kind.

exit codes: 0 done, 1 failed, 2 refused
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument(
        "run", type=Path, metavar="OUT", help="the output directory that the run was given"
    )
    parser.add_argument(
        "--to", required=True, metavar="KIND:DIR", help="hf:DIR or megatron:DIR, to be written"
    )
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint; the newest else")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="type of the weights; auto: as the student came",
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel processes")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def execute(args: argparse.Namespace) -> int:
    """Writes the model."""
    from slimtron_common.parallel import ParallelConfig
    from slimtron_common.parallel.context import rank_from_environment
    from slimtron_distill.job.export import export_checkpoint

    step = export_checkpoint(
        args.run,
        args.to,
        step=args.step,
        dtype=args.dtype,
        parallel=ParallelConfig(tensor_parallel_size=args.tp, pipeline_parallel_size=args.pp),
        device=args.device,
        overwrite=args.overwrite,
    )
    if rank_from_environment() == 0:
        print(f"wrote {args.to}, the student of step {step}")
    return 0
