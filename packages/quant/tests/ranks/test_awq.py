from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimtron_common.checkpoint.weights import gather_shards, load_weights, whole_tensors
from slimtron_common.integrations.modelopt import QuantizerEntry, named_config, to_modelopt
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelConfig, forward_only, initialize_parallel
from slimtron_common.testing import run_ranks
from slimtron_quant.awq import LayerScale, awq_calibrate

ARCHITECTURE = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=96,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=10000.0,
)
LAYOUTS = {
    "tensor": ParallelConfig(tensor_parallel_size=2),
    "sequence": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True),
    "pipeline": ParallelConfig(pipeline_parallel_size=2),
    "data": ParallelConfig(),
}

Outcome = tuple[dict[str, LayerScale], dict[str, Tensor]]


def read(name: str) -> Tensor:
    """A Hugging Face tensor of the model, the same in every layout."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    h, f = ARCHITECTURE.hidden_size, ARCHITECTURE.ffn_hidden_size
    kv = ARCHITECTURE.num_query_groups * ARCHITECTURE.head_dim
    shapes = {
        "embed": (ARCHITECTURE.vocab_size, h),
        "lm_head": (ARCHITECTURE.vocab_size, h),
        "q_proj": (h, h),
        "o_proj": (h, h),
        "k_proj": (kv, h),
        "v_proj": (kv, h),
        "gate": (f, h),
        "up": (f, h),
        "down": (h, f),
    }
    shape = next((s for key, s in shapes.items() if key in name), None)
    if shape is None:
        return torch.rand(h, generator=generator) * 3 + 0.2
    return torch.randn(shape, generator=generator) * 0.2


def config(name: str) -> dict[str, Any]:
    output_layer = QuantizerEntry("*output_layer*", enable=False)
    recipe = named_config(name).with_block_size(16).with_entries(output_layer)
    return to_modelopt(recipe.with_algorithm(None))


def calibrate(layout: ParallelConfig, name: str) -> Outcome:
    """Quantizes the model; returns its layers and tensors, whole and by global names."""
    import modelopt.torch.quantization as mtq

    with initialize_parallel(layout) as context:
        model = build_model(ARCHITECTURE, context, dtype=torch.float32)
        load_weights(model, ARCHITECTURE, context, read)
        tokens = torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(0))
        mine = tokens[context.dp_rank :: context.dp_size]
        mtq.quantize(model, config(name))
        result = awq_calibrate(model, lambda model: forward_only(model, mine.split(2), context))

        tensors = dict(whole_tensors(model, ARCHITECTURE, context))
        scales = {}
        decoder: Any = model.decoder
        offset = decoder.layers[0].layer_number - 1
        for local, scale in result.layers.items():
            _, _, number, rest = local.split(".", 3)
            layer = f"{int(number) + offset}.{rest}"
            scales[layer] = scale
            module: Any = model.get_submodule(local)
            factor = module.input_quantizer.pre_quant_scale
            if module._is_row_parallel:
                factor = torch.cat(gather_shards(factor, context))
            tensors[f"{layer}.pre_quant_scale"] = factor.clone()
            # Per tensor, equal on all processes: of inputs, and of weights after INT4.
            if name == "W4A8_AWQ_BETA_CFG":
                tensors[f"{layer}.weight_amax"] = module.weight_quantizer[1].amax.clone()
            if module.input_quantizer.is_enabled:
                tensors[f"{layer}.input_amax"] = module.input_quantizer.amax.clone()
        return scales, tensors


def check_rank(rank: int, world_size: int, cases: list[tuple[str, str]]) -> list[Outcome]:
    return [calibrate(LAYOUTS[layout], name) for layout, name in cases]


def test_every_layout_gives_the_scales_of_one_process() -> None:
    names = ["INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG", "INT8_DEFAULT_CFG"]
    cases = [(layout, name) for name in names[:2] for layout in LAYOUTS]
    cases += [("tensor", names[2])]
    alone = run_ranks(check_rank, 1, [("data", name) for name in names])[0]
    expected = dict(zip(names, alone, strict=True))

    ranks = run_ranks(check_rank, 2, cases)

    for (layout, name), first, second in zip(cases, *ranks, strict=True):
        if layout != "pipeline":
            assert first[0] == second[0], "the choice must be equal to the last bit on all ranks"
        scales, tensors = ({**mine, **other} for mine, other in zip(first, second, strict=True))
        reference, whole = expected[name]
        assert len(scales) == 8
        for layer, scale in scales.items():
            assert scale.alpha == reference[layer].alpha, f"{name} {layout} {layer}"
            assert scale.num_tokens == reference[layer].num_tokens == 96
            # fp32 sums in another order, of inputs that differ by as much.
            assert scale.signal == pytest.approx(reference[layer].signal, rel=1e-5)
            # A weight midway between two levels takes either by the last bit of its scale.
            assert scale.losses == pytest.approx(reference[layer].losses, rel=2e-3)
        torch.testing.assert_close(tensors, whole, rtol=1e-5, atol=1e-5)


def calibrate_experts(rank: int, world_size: int) -> dict[str, tuple[LayerScale, Tensor]]:
    """Quantizes a layer of 4 experts, the last of which gets no token; by global expert."""
    import modelopt.torch.quantization as mtq
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

    # Megatron-Core 0.16 reads this name without defining it where Transformer Engine is absent.
    vars(moe_utils).setdefault("te_general_gemm", None)
    with initialize_parallel(ParallelConfig(expert_parallel_size=world_size)) as context:
        model = GPTModel(
            config=TransformerConfig(
                num_layers=1,
                hidden_size=64,
                num_attention_heads=4,
                normalization="RMSNorm",
                add_bias_linear=False,
                gated_linear_unit=True,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                num_moe_experts=4,
                moe_router_topk=1,
                moe_router_pre_softmax=True,
                moe_ffn_hidden_size=128,
                expert_model_parallel_size=world_size,
                gradient_accumulation_fusion=False,
                persist_layer_norm=False,
                masked_softmax_fusion=False,
            ),
            transformer_layer_spec=get_gpt_layer_local_spec(
                num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm"
            ),
            vocab_size=96,
            max_sequence_length=64,
            position_embedding_type="rope",
        )
        model.eval().requires_grad_(False)
        mlp = model.decoder.layers[0].mlp
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and ".experts." not in name:
                generator = torch.Generator().manual_seed(sum(name.encode()))
                parameter.normal_(std=0.2, generator=generator)
        # Of two opposite logits one is positive: an expert whose logit is 0 is never chosen.
        mlp.router.weight[1] = -mlp.router.weight[0]
        mlp.router.weight[3] = 0
        local = mlp.experts.local_experts
        for index, expert in enumerate(local, start=rank * len(local)):
            for parameter in expert.parameters():
                generator = torch.Generator().manual_seed(index)
                parameter.normal_(std=0.2, generator=generator)
        tokens = torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(0))
        mine = tokens[context.dp_rank :: context.dp_size]
        mtq.quantize(model, config("INT4_AWQ_CFG"))
        result = awq_calibrate(model, lambda model: forward_only(model, mine.split(2), context))
        found = {}
        for index, expert in enumerate(local):
            for linear in ("linear_fc1", "linear_fc2"):
                quantizer = getattr(expert, linear).weight_quantizer
                name = f"decoder.layers.0.mlp.experts.local_experts.{index}.{linear}"
                found[f"{rank * len(local) + index}.{linear}"] = (
                    result.layers[name],
                    quantizer.amax.clone(),
                )
        return found


def test_experts_are_searched_one_by_one_wherever_they_lie() -> None:
    (alone,) = run_ranks(calibrate_experts, 1)
    first, second = run_ranks(calibrate_experts, 2)
    assert alone["2.linear_fc1"][0].num_tokens > 0
    for linear in ("linear_fc1", "linear_fc2"):
        assert alone[f"3.{linear}"][0].num_tokens == 0
        assert alone[f"3.{linear}"][0].alpha is None
    for name, (scale, amax) in {**first, **second}.items():
        reference, reference_amax = alone[name]
        assert (scale.alpha, scale.num_tokens) == (reference.alpha, reference.num_tokens)
        assert scale.losses == pytest.approx(reference.losses, rel=2e-3)
        # ModelOpt would give both processes' experts the larger of their scales.
        torch.testing.assert_close(amax, reference_amax, rtol=1e-5, atol=1e-6)
