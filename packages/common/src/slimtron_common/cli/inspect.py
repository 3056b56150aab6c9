"""``slimtron-common inspect``: what a checkpoint is, without loading it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimtron_common.inspection import Inspection
    from slimtron_common.manifest import Manifest
    from slimtron_common.models.architecture import Architecture

HELP = "Tell what a checkpoint is: its shape, size, type and the layouts it can be cut into."
EPILOG = """\
Examples:
  slimtron-common demo-model smollm2
  slimtron-common inspect hf:smollm2
  slimtron-common inspect hf:smollm2 --json

No weights are loaded. Exit code: 0 it is sound as far as its headers tell, 2 it is not.
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``inspect``."""
    parser.add_argument("model", metavar="KIND:DIR", help="hf:DIR, megatron:DIR or nemo2:DIR")
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")


def execute(args: argparse.Namespace) -> int:
    """Prints the description of a checkpoint."""
    import json

    from slimtron_common.inspection import inspect_checkpoint

    inspection = inspect_checkpoint(args.model)
    if args.json:
        print(json.dumps(inspection.to_dict(), indent=2))
    else:
        _print(inspection)
    return 0


def _print(inspection: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    a = inspection.architecture
    total = inspection.num_parameters
    rows = [
        ("architecture", f"{a.family}, {a.num_layers} layers"),
        ("hidden size", f"{a.hidden_size}, feed-forward {a.ffn_hidden_size}"),
        *(
            [("experts", f"{a.moe.num_experts}, {a.moe.experts_per_token} a token")]
            if a.moe
            else []
        ),
        *(
            [
                ("layers", a.hybrid.pattern),
                (
                    "mamba",
                    f"{a.hybrid.mamba_num_heads} heads of {a.hybrid.mamba_head_dim}, "
                    f"{a.hybrid.mamba_num_groups} groups, state {a.hybrid.mamba_state_dim}",
                ),
            ]
            if a.hybrid
            else []
        ),
        (
            "attention",
            f"{a.num_attention_heads} heads of {a.head_dim}, {a.num_query_groups} key/value heads",
        ),
        ("vocabulary", f"{a.vocab_size}, output layer {'tied' if a.tied_embeddings else 'apart'}"),
        ("positions", _positions(a)),
        ("parameters", f"{total:,}"),
        *(
            (f"  {component}", f"{count:,} ({count / total:.1%})")
            for component, count in inspection.parameters.items()
        ),
        ("on disk", f"{inspection.weight_bytes / 2**20:,.1f} MiB"),
        (
            "stored as",
            ", ".join(f"{name} ({count:,})" for name, count in inspection.dtypes.items()),
        ),
        ("quantized", _quantization(inspection)),
        ("tokenizer", "present" if inspection.tokenizer else "absent"),
        ("tensor-parallel sizes", ", ".join(map(str, inspection.tensor_parallel_sizes))),
        ("pipeline sizes", _pipeline_sizes(inspection)),
        *(
            [("expert-parallel sizes", ", ".join(map(str, inspection.expert_parallel_sizes)))]
            if a.moe
            else []
        ),
        ("written by", _origin(inspection.manifest)),
    ]
    title = f"{inspection.kind}:{inspection.path}"
    table = Table(title=Text(title), show_header=False)
    for name, value in rows:
        # Names of files and fields may hold what rich takes for markup.
        table.add_row(name, Text(value))
    Console().print(table)
    if inspection.quantization:
        print("Slimtron opens original weights only: `slimtron-quant verify DIR` checks this one.")


def _pipeline_sizes(inspection: Inspection) -> str:
    sizes = inspection.pipeline_parallel_sizes
    if inspection.architecture.hybrid:
        return ", ".join(map(str, sizes))
    return f"1 to {max(sizes)}"


def _positions(architecture: Architecture) -> str:
    a = architecture
    if a.hybrid:
        return f"{a.max_position_embeddings}, none embedded"
    parts = [f"{a.max_position_embeddings}", f"RoPE base {a.rotary_base:g}"]
    if a.rotary_fraction != 1:
        parts.append(f"on {a.rotary_fraction:.0%} of each head")
    if a.rotary_scaling_factor is not None:
        parts.append(f"Llama 3 scaling by {a.rotary_scaling_factor:g}")
    if a.rotary_interpolation is not None:
        parts.append(f"interpolated by {a.rotary_interpolation:g}")
    if a.sliding_window is not None:
        parts.append(f"sliding window {a.sliding_window}")
    return ", ".join(parts)


def _quantization(inspection: Inspection) -> str:
    if not inspection.quantization:
        return "no"
    settings = ", ".join(
        f"{name} {value}"
        for name, value in inspection.quantization.items()
        if isinstance(value, str | int | float)
    )
    return f"yes: {settings}"


def _origin(manifest: Manifest | None) -> str:
    if manifest is None:
        return "not Slimtron"
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return f"Slimtron ({manifest.kind}): {versions}"
