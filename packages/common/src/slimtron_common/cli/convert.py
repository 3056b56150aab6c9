"""``slimtron-common convert``: the same model as another kind of checkpoint, proved."""

from __future__ import annotations

import argparse

HELP = "Write a checkpoint as another kind or in another type, read it back and compare."
EPILOG = """\
Examples:
  slimtron-common demo-model smollm2
  slimtron-common convert hf:smollm2 megatron:smollm2-mcore
  slimtron-common convert megatron:smollm2-mcore hf:smollm2-fp32 --dtype float32
  slimtron-common convert hf:smollm2 nemo2:smollm2-nemo
  torchrun --nproc-per-node 2 -m slimtron_common convert hf:smollm2 megatron:smollm2-pp2 --pp 2

Exit code: 0 done, 1 what was written is not the same model (nothing is kept), 2 refused.
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``convert``."""
    parser.add_argument("source", metavar="SRC", help="hf:DIR, megatron:DIR or nemo2:DIR")
    parser.add_argument(
        "target", metavar="DST", help="hf:DIR, megatron:DIR or nemo2:DIR, to be written"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights to write; that of SRC without it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel processes")
    machine.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages")
    machine.add_argument(
        "--ep", type=int, default=1, metavar="N", help="processes that share out the experts"
    )
    machine.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute"
    )


def execute(args: argparse.Namespace) -> int:
    """Converts a checkpoint and prints how close the result is."""
    from slimtron_common.conversion import convert, plan_conversion
    from slimtron_common.parallel import ParallelConfig
    from slimtron_common.parallel.context import rank_from_environment

    plan = plan_conversion(
        args.source,
        args.target,
        dtype=args.dtype,
        parallel=ParallelConfig(
            tensor_parallel_size=args.tp,
            pipeline_parallel_size=args.pp,
            expert_parallel_size=args.ep,
        ),
        device=args.device,
        overwrite=args.overwrite,
    )
    done = convert(plan)
    if rank_from_environment() != 0:
        return 0

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    dtype = str(done.dtype).removeprefix("torch.")
    table = Table(title=Text(args.target), show_header=False)
    table.add_row("parameters", f"{done.num_parameters:,}")
    table.add_row("on disk", f"{done.weight_bytes / 2**20:,.1f} MiB, {dtype}")
    table.add_row("largest logit", f"{done.largest_logit:.4g}")
    table.add_row("changed by rounding the weights", f"{done.rounding:.3g}")
    table.add_row("changed when read back", f"{done.difference:.3g}")
    Console().print(table)
    return 0
