from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from slimtron_common.models.norms import NORMS


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_in_float64(name: str, dtype: torch.dtype) -> None:
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=True)
    norm = NORMS[name](config, 32, eps=1e-3)  # type: ignore[index, call-arg, arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(32, generator=generator) * 1e-2)
    x = torch.randn(4, 32, generator=generator).to(dtype) + 1
    wide = x.double()
    if name == "layernorm1p":
        wide = wide - wide.mean(-1, keepdim=True)
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    expected = expected * (norm.weight.double() + (name != "rmsnorm"))
    if name == "layernorm1p":
        expected = expected + norm.bias.double()
    found = norm(x)
    assert found.dtype is dtype
    eps = torch.finfo(dtype).eps
    # One rounding at the end; torch's own RMSNorm rounds once more before the weight.
    torch.testing.assert_close(found.double(), expected, rtol=2 * eps, atol=2 * eps)
    assert all(parameter.sequence_parallel for parameter in norm.parameters())
