from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import (
    get_kv_cache_dtype,
    get_kv_cache_scaling_factor,
    postprocess_state_dict,
)
from torch import nn

from slimtron_common.errors import CheckpointError
from slimtron_common.integrations.modelopt import make_quantizer
from slimtron_common.models.architecture import Architecture
from slimtron_common.testing.versions import needs
from slimtron_quant.calibration.kv_cache import raise_kv_scales
from slimtron_quant.export.kv_cache import kv_cache_scales
from slimtron_quant.formats.detect import LayerFormat
from slimtron_quant.formats.hf_quant_config import config_json_quantization, hf_quant_config
from slimtron_quant.formats.kv_cache import (
    KV_CACHE_FORMATS,
    describe_kv_cache,
    kv_cache_format,
    kv_cache_format_announced,
)
from slimtron_quant.recipes.kv_cache import named_kv_cache


def model(qformat: str, largest_key: float, largest_value: float) -> SimpleNamespace:
    """A stage whose only layer, the sixth of the model, has calibrated quantizers."""
    attention = nn.Module()
    for name, amax in (("k", largest_key), ("v", largest_value)):
        quantizer = make_quantizer([named_kv_cache(qformat).attributes])
        quantizer.amax = torch.tensor(amax)
        attention.add_module(f"{name}_bmm_quantizer", quantizer)
    layer = SimpleNamespace(
        layer_number=6, self_attention=SimpleNamespace(core_attention=attention)
    )
    return SimpleNamespace(decoder=SimpleNamespace(layers=[layer]))


def attention_of(stage: SimpleNamespace) -> nn.Module:
    attention: nn.Module = stage.decoder.layers[0].self_attention.core_attention
    return attention


@needs("nvidia-modelopt", "0.47", what="scales of a KV cache below 1")
@pytest.mark.parametrize("qformat", KV_CACHE_FORMATS)
def test_scales_are_those_of_modelopts_hugging_face_export(qformat: str) -> None:
    stage = model(qformat, 600.0, 12.5)
    attention = attention_of(stage)
    expected = postprocess_state_dict(
        {f"model.layers.5.self_attn.{k}": v for k, v in attention.state_dict().items()},
        448.0,
        get_kv_cache_dtype(attention),
    )
    scales = kv_cache_scales(stage)
    assert scales.keys() == expected.keys()
    for name, scale in scales.items():
        assert torch.equal(scale, expected[name].reshape(()))
        assert scale.dtype == torch.float32


def test_raised_scales_are_those_of_modelopts_megatron_export() -> None:
    stage = model("fp8", 600.0, 12.5)
    expected = get_kv_cache_scaling_factor(attention_of(stage))
    raise_kv_scales(stage)
    assert list(kv_cache_scales(stage).values()) == [float(scale) for scale in expected]
    assert float(expected[1]) == 1
    fine = model("nvfp4", 600.0, 12.5)
    raise_kv_scales(fine)
    assert kv_cache_scales(fine)["model.layers.5.self_attn.v_proj.v_scale"] == 12.5 / 448


@needs("nvidia-modelopt", "0.47", what="constant scales of the KV cache")
def test_a_constant_scale_is_one() -> None:
    stage = model("fp8", 1.0, 1.0)
    for quantizer in attention_of(stage).children():
        del quantizer._amax
        quantizer.set_from_attribute_config({"num_bits": (4, 3), "use_constant_amax": True})
    assert [float(scale) for scale in kv_cache_scales(stage).values()] == [1.0, 1.0]


@pytest.mark.parametrize(
    # ModelOpt on the CPU scales bfloat16 numbers in bfloat16: exact with a scale of 1 alone.
    ("largest", "dtype"),
    [(448.0, torch.float32), (448.0, torch.bfloat16), (30.0, torch.float32)],
)
def test_fp8_rounds_as_modelopt_does(largest: float, dtype: torch.dtype) -> None:
    stage = model("fp8", largest, largest)
    fmt = kv_cache_format(stage)
    assert fmt is KV_CACHE_FORMATS["fp8"]
    torch.manual_seed(0)
    # Some exceed the range.
    keys = (12 * torch.randn(7, 2, 3, 16)).to(dtype)
    scale = next(iter(kv_cache_scales(stage).values()))
    expected = attention_of(stage).k_bmm_quantizer(keys)
    assert torch.equal(fmt.round(keys, scale), expected)


def test_the_scale_of_nvfp4_is_that_of_a_block_of_largest_codes() -> None:
    # Codes 6 times block scales of 448 / 6: the largest number is exact, and so are the others.
    numbers = torch.tensor([6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0] * 2) * 7
    rounded = KV_CACHE_FORMATS["nvfp4"].round(numbers, torch.tensor(42.0 / 448))
    torch.testing.assert_close(rounded, numbers, rtol=1e-6, atol=0)


@pytest.mark.parametrize("qformat", KV_CACHE_FORMATS)
@pytest.mark.parametrize("weights", [LayerFormat("fp8"), None])
def test_both_files_announce_it(qformat: str, weights: LayerFormat | None) -> None:
    layers = {"model.layers.0.mlp.up_proj": weights, "lm_head": None}
    fmt = KV_CACHE_FORMATS[qformat]
    file, config = hf_quant_config(layers, fmt), config_json_quantization(layers, fmt)
    quantization = file["quantization"]
    assert quantization["quant_algo"] == "FP8"
    assert quantization["exclude_modules"] == (["lm_head"] if weights else ["*"])
    assert kv_cache_format_announced(quantization["kv_cache_quant_algo"]) is fmt
    converted = convert_hf_quant_config_format(file)
    if weights is None:
        assert config["config_groups"] == {}
        converted["config_groups"] = {}
    assert config == converted


def test_an_unknown_cache_is_refused() -> None:
    with pytest.raises(CheckpointError, match="INT8"):
        kv_cache_format_announced("INT8")


def test_memory_of_a_token() -> None:
    # SmolLM2-135M.
    architecture = Architecture(
        family="llama",
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        head_dim=64,
        vocab_size=512,
        max_position_embeddings=64,
        norm_epsilon=1e-5,
        rotary_base=10000.0,
    )

    def described(name: str | None, itemsize: int) -> str:
        fmt = None if name is None else KV_CACHE_FORMATS[name]
        return describe_kv_cache(fmt, architecture, itemsize)

    # 2 x 30 layers x 3 heads x 64 numbers.
    assert described(None, 2) == "as it was, 23,040 bytes a token"
    assert described("fp8", 2) == "fp8, 11,520 where there were 23,040 bytes a token"
    # Half a byte, and a byte for 16 numbers.
    assert described("nvfp4", 4) == "nvfp4, 6,480 where there were 46,080 bytes a token"
