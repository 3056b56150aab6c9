from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import nn

from slimtron_common.errors import UnsupportedModelError
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, initialize_parallel
from slimtron_quant import QuantizationConfig, Quantizer, calibration_loop
from slimtron_quant.calibration.kv_cache import check_kv_quantizers

ARCHITECTURE = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=10000.0,
)


class OwnAttention(nn.Module):
    """Attention that ModelOpt knows nothing of."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.original(*args, **kwargs)


@pytest.fixture
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as found:
        yield found


def built(context: ParallelContext) -> Any:
    torch.manual_seed(0)
    model = build_model(ARCHITECTURE, context, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1) if parameter.dim() > 1 else parameter.data.fill_(1)
    return model


def test_every_layer_calibrates_what_it_caches(context: ParallelContext) -> None:
    model = built(context)
    tokens = torch.randint(0, 64, (2, 16))
    seen: dict[int, list[float]] = {}
    hooks = [
        layer.self_attention.core_attention.register_forward_pre_hook(
            lambda _, args, n=n: seen.update({n: [float(x.abs().max()) for x in args[1:3]]})
        )
        for n, layer in enumerate(model.decoder.layers)
    ]
    loop = calibration_loop([tokens], context)
    loop(model)
    for hook in hooks:
        hook.remove()
    config = QuantizationConfig(None, enable_kv_cache=True)
    quantizer = Quantizer(config)
    quantizer.quantize(model, loop)
    assert not any(layer.format for layer in quantizer.layers)
    for number, layer in enumerate(model.decoder.layers):
        attention = layer.self_attention.core_attention
        assert not attention.q_bmm_quantizer.is_enabled
        for name, largest in zip("kv", seen[number], strict=True):
            # Far below the largest FP8 number, so the scale is 1.
            assert 0 < largest < 448
            assert float(getattr(attention, f"{name}_bmm_quantizer").amax) == 448


@pytest.mark.parametrize("algorithm", [None, "fp8"])
def test_a_layer_spec_without_a_place_is_refused(
    algorithm: str | None, context: ParallelContext
) -> None:
    model = built(context)
    attention = model.decoder.layers[1].self_attention
    attention.core_attention = OwnAttention(attention.core_attention)
    quantizer = Quantizer(QuantizationConfig(algorithm, enable_kv_cache=True))
    with pytest.raises(UnsupportedModelError, match=r"layer 1 \(OwnAttention\)") as error:
        quantizer.quantize(model, lambda _: pytest.fail("calibrated for nothing"))
    assert error.value.where == "enable_kv_cache"
    assert "layer spec" in str(error.value.hint)


def test_layers_that_cache_nothing_need_no_quantizers() -> None:
    pruned = SimpleNamespace(layer_number=1, self_attention=IdentityOp())
    recurrent = SimpleNamespace(layer_number=2, mixer=nn.Identity())
    check_kv_quantizers(SimpleNamespace(decoder=SimpleNamespace(layers=[pruned, recurrent])))  # type: ignore[arg-type]


def test_an_attention_without_a_core_is_refused() -> None:
    layer = SimpleNamespace(layer_number=1, self_attention=nn.Identity())
    with pytest.raises(UnsupportedModelError, match=r"layer 0 \(Identity\)"):
        check_kv_quantizers(SimpleNamespace(decoder=SimpleNamespace(layers=[layer])))  # type: ignore[arg-type]
