"""``slimtron-common evaluate``: perplexity, and the distance to another model."""

from __future__ import annotations

import argparse

HELP = "Measure a model on text: perplexity, and the distance to another model."
EPILOG = """\
Examples:
  slimtron-common demo-model smollm2
  slimtron-common evaluate hf:smollm2 --data pydoc
  slimtron-common evaluate hf:smollm2 --against hf:smollm2 --data pydoc --dtype bfloat16 --json
  torchrun --nproc-per-node 3 -m slimtron_common evaluate hf:smollm2 --data pydoc --tp 3

Exit code: 0 done, 1 failed, 2 refused.
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``evaluate``."""
    parser.add_argument("model", metavar="KIND:DIR", help="hf:DIR, megatron:DIR or nemo2:DIR")
    parser.add_argument(
        "--against", metavar="KIND:DIR", help="the model to measure the distance from"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help="pydoc, a .txt, .jsonl or .parquet file, or hf:NAME[,CONFIG][:SPLIT]",
    )
    text.add_argument("--text-field", default="text", metavar="NAME", help="field with the text")
    text.add_argument("--num-tokens", type=int, default=4096, metavar="N", help="tokens in all")
    text.add_argument(
        "--seq-length", type=int, default=512, metavar="N", help="tokens in a sequence"
    )
    text.add_argument(
        "--micro-batch-size", type=int, default=1, metavar="N", help="sequences in a forward pass"
    )
    text.add_argument(
        "--seed", type=int, default=1234, metavar="N", help="seeds the order of texts"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel processes")
    machine.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages")
    machine.add_argument(
        "--ep", type=int, default=1, metavar="N", help="processes that share out the experts"
    )
    machine.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute"
    )
    machine.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="to compute in; auto: as stored on a GPU, float32 on the CPU",
    )
    machine.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the tokenizer run code that comes with the model",
    )


def execute(args: argparse.Namespace) -> int:
    """Evaluates a model and prints the comparison."""
    from slimtron_common.evaluation.config import EvaluationConfig
    from slimtron_common.evaluation.measure import measure, plan_evaluation
    from slimtron_common.parallel import ParallelConfig
    from slimtron_common.parallel.context import rank_from_environment
    from slimtron_common.report import print_comparison
    from slimtron_common.report.write import to_json

    plan = plan_evaluation(
        args.model,
        EvaluationConfig(
            source=args.data,
            num_tokens=args.num_tokens,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            text_field=args.text_field,
        ),
        against=args.against,
        parallel=ParallelConfig(
            tensor_parallel_size=args.tp,
            pipeline_parallel_size=args.pp,
            expert_parallel_size=args.ep,
        ),
        device=args.device,
        dtype=args.dtype,
        seed=args.seed,
        trust_remote_code=args.trust_remote_code,
    )
    comparison = measure(plan)
    if rank_from_environment() == 0:
        if args.json:
            print(to_json(comparison), end="")
        else:
            print_comparison(comparison)
    return 0
