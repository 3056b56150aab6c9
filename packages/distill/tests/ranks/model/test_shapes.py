"""What stages are told of the shapes that they send."""

from __future__ import annotations

from typing import Any

import torch

from slimtron_common.models.architecture import Architecture
from slimtron_common.models.megatron import build_chunks
from slimtron_common.parallel import ParallelConfig, ParallelContext, initialize_parallel
from slimtron_common.testing import run_ranks
from slimtron_distill import (
    DistillationConfig,
    adjust_distillation_model_for_mcore,
    distillation_task,
    get_tensor_shapes_adjust_fn_for_distillation,
)


def _build(num_layers: int, width: int, context: ParallelContext) -> list[Any]:
    architecture = Architecture(
        family="llama",
        num_layers=num_layers,
        hidden_size=width,
        ffn_hidden_size=32,
        num_attention_heads=2,
        num_query_groups=2,
        head_dim=8,
        vocab_size=64,
        max_position_embeddings=32,
        norm_epsilon=1e-5,
        rotary_base=10000.0,
    )
    return build_chunks(architecture, context, dtype=torch.float32)


def _in_layout(vpp: int, **parallel: Any) -> dict[str, Any]:
    config = ParallelConfig(**parallel)
    with initialize_parallel(config, device="cpu", virtual_pipeline_size=vpp) as context:
        student = _build(4, 16, context)
        task = distillation_task(
            student, _build(8, 24, context), DistillationConfig(), context, vocab_size=64
        )
        model: Any = list(task.chunks)
        adjust_distillation_model_for_mcore(model[0], DistillationConfig())
        adjust = get_tensor_shapes_adjust_fn_for_distillation
        result: dict[str, Any] = {
            "forward_only": adjust(model, 8, 2, forward_only=True),
            "student": adjust(student, 8, 2),
            "function": None,
            "width": [(model[0].train(mode).config.hidden_size) for mode in (True, False)],
        }
        function = adjust(torch.nn.ModuleDict({"module": model[0]}), 8, 2)
        if vpp == 1 and function is not None:
            recv = [(8, 2, 16)]
            result["function"] = [
                function(recv, recv) for mode in (True, False) if model[0].train(mode) is model[0]
            ]
            assert recv == [(8, 2, 16)]
        result["task"] = task.adjust_tensor_shapes_fn is not None
        return result


def _on_rank(*_: int) -> dict[str, Any]:
    return {
        "tp2": _in_layout(1, tensor_parallel_size=2),
        "pp2": _in_layout(1, pipeline_parallel_size=2),
        "vpp2": _in_layout(2, pipeline_parallel_size=2),
    }


def test_nothing_is_adjusted_that_need_not_be() -> None:
    for rank in run_ranks(_on_rank, 2):
        for layout, result in rank.items():
            assert result["forward_only"] is result["student"] is None, layout
            assert result["task"] == (layout == "pp2")
            # Only the interleaved schedule looks for the width there, and in training alone.
            assert result["width"] == ([40, 16] if layout == "vpp2" else [16, 16])
        assert rank["tp2"]["function"] is rank["vpp2"]["function"] is None
        packed, plain = [(8, 2, 40)], [(8, 2, 16)]
        assert rank["pp2"]["function"] == [(packed, packed), (plain, plain)]
