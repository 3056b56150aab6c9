"""``slimtron-quant export``: a quantized checkpoint becomes a Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a quantized checkpoint for inference engines, and prove it the same"
EPILOG = """\
examples:
  slimtron-quant run --model hf:smollm2 --recipe fp8 --export-format megatron --out smollm2-qat \\
      --data pydoc --calib-size 4 --calib-seq-len 512 --calib-batch-size 1
  slimtron-quant export megatron:smollm2-qat --out smollm2-fp8

exit codes: 0 done, 1 failed, 2 refused
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument("model", metavar="KIND:DIR", help="megatron:DIR or nemo2:DIR, quantized")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument(
        "--export-dtype",
        default="bf16",
        metavar="TYPE",
        help="of unquantized weights: bf16, 16, 32",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    text = parser.add_argument_group("text to compare on")
    text.add_argument("--data", default="pydoc", metavar="SOURCE", help="as for `run`")
    text.add_argument("--eval-tokens", type=int, default=4096, metavar="N", help="tokens")
    text.add_argument("--eval-seq-len", type=int, default=512, metavar="N", help="tokens in one")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel processes")
    machine.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages")
    machine.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute"
    )


def execute(args: argparse.Namespace) -> int:
    """Exports the checkpoint and prints the comparison."""
    from slimtron_common.evaluation.config import EvaluationConfig
    from slimtron_common.parallel import ParallelConfig
    from slimtron_common.parallel.context import rank_from_environment
    from slimtron_common.report import print_comparison
    from slimtron_quant.config import ExportConfig
    from slimtron_quant.job.export import export, plan_export

    plan = plan_export(
        args.model,
        ExportConfig(args.out, dtype=args.export_dtype),
        EvaluationConfig(
            source=args.data, num_tokens=args.eval_tokens, seq_length=args.eval_seq_len
        ),
        parallel=ParallelConfig(tensor_parallel_size=args.tp, pipeline_parallel_size=args.pp),
        device=args.device,
        overwrite=args.overwrite,
    )
    comparison = export(plan)
    if rank_from_environment() == 0:
        print_comparison(comparison)
        print(f"{'model':<10} {args.out}")
    return 0
