"""Modules under Transformer Engine's names in plain torch, for forward passes of one process.

ModelOpt prunes models of Transformer Engine's modules alone. Where that is not installed,
``install()`` puts these in its place before Megatron-Core is imported, so that ModelOpt can be
measured on the CPU. They compute the same functions, without parallelism, FP8 or gradients.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["install"]


class _Norm(nn.Module):
    def __init__(self, hidden_size: int = 0, eps: float = 1e-5, **options: Any) -> None:
        super().__init__()
        hidden_size = options.get("normalized_shape", hidden_size)
        self.eps = eps
        self.zero_centered_gamma = options.get("zero_centered_gamma", False)
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=options.get("params_dtype")))


class RMSNorm(_Norm):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered_gamma else self.weight
        return F.rms_norm(x, self.weight.shape, weight, self.eps)


class LayerNorm(_Norm):
    def __init__(self, hidden_size: int = 0, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(hidden_size, eps, **options)
        self.bias = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered_gamma else self.weight
        return F.layer_norm(x, self.weight.shape, weight, self.bias, self.eps)


class TransformerEngineBaseModule(nn.Module):
    fuse_wgrad_accumulation = False

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass

    def set_tensor_parallel_group(self, group: Any) -> None:
        self.tp_group = group


class Linear(TransformerEngineBaseModule):
    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.parallel_mode = options.get("parallel_mode")
        self.tp_size, self.tp_group = 1, options.get("tp_group")
        self.sequence_parallel = False
        self.use_bias = options.get("bias", True)
        self.return_bias = options.get("return_bias", False) and self.use_bias
        self.apply_bias = self.use_bias and not self.return_bias
        dtype = options.get("params_dtype")
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))
        zeros = torch.zeros(out_features if self.use_bias else 0, dtype=dtype)
        self.bias = nn.Parameter(zeros) if self.use_bias else zeros

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        y = F.linear(x, self.weight, self.bias if self.apply_bias else None)
        return (y, self.bias) if self.return_bias else y


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self.eps = options.get("eps", 1e-5)
        self.normalization = options.get("normalization", "LayerNorm")
        self.zero_centered_gamma = options.get("zero_centered_gamma", False)
        self.return_layernorm_output = options.get("return_layernorm_output", False)
        dtype = options.get("params_dtype")
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=dtype))
        self.layer_norm_bias = None
        if self.normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, dtype=dtype))

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        weight = self.layer_norm_weight + (1 if self.zero_centered_gamma else 0)
        if self.layer_norm_bias is None:
            normed = F.rms_norm(x, weight.shape, weight, self.eps)
        else:
            normed = F.layer_norm(x, weight.shape, weight, self.layer_norm_bias, self.eps)
        y = super().forward(normed)
        if not self.return_layernorm_output:
            return y
        return (*y, normed) if isinstance(y, tuple) else (y, normed)


class GroupedLinear(nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("build the model without moe_grouped_gemm")


class DotProductAttention(nn.Module):
    def __init__(self, num_attention_heads: int, kv_channels: Any, **options: Any) -> None:
        super().__init__()
        # ModelOpt sets what it prunes.
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = self.num_gqa_groups_per_partition = options.get("num_gqa_groups")
        self.scale = options.get("softmax_scale")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class Format(enum.Enum):
    E4M3 = 1
    HYBRID = 2
    E5M2 = 3


class FP8GlobalStateManager:
    is_fp8_enabled = is_fp8_calibration = staticmethod(lambda: False)
    get_fp8_recipe = reset = staticmethod(lambda: None)


class CudaRNGStatesTracker:
    def __init__(self) -> None:
        self.states: dict[str, Tensor] = {}

    def get_states(self) -> dict[str, Tensor]:
        return self.states

    def add(self, name: str, seed: int) -> None:
        self.states[name] = torch.Generator().manual_seed(seed).get_state()

    def reset(self) -> None:
        self.states.clear()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Any:
        yield


def _undefined(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def install() -> None:
    """Makes ``import transformer_engine`` find these modules; before Megatron-Core is imported."""
    assert "megatron.core" not in sys.modules, "Megatron-Core has looked for it already"
    unused = {name: type(name, (), {}) for name in ("_Linear", "_LayerNormLinear", "_Grouped")}
    recipes = (
        "Recipe",
        "DelayedScaling",
        "Float8CurrentScaling",
        "MXFP8BlockScaling",
        "Float8BlockScaling",
    )
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": "2.4.0"},
        ".common": {},
        ".common.recipe": {
            **{name: type(name, (), {}) for name in recipes},
            "Format": Format,
        },
        ".pytorch": {
            "Linear": Linear,
            "LayerNormLinear": LayerNormLinear,
            "GroupedLinear": GroupedLinear,
            "LayerNorm": LayerNorm,
            "RMSNorm": RMSNorm,
            "DotProductAttention": DotProductAttention,
            "fp8_autocast": contextlib.nullcontext,
        },
        ".pytorch.attention": {"DotProductAttention": DotProductAttention},
        ".pytorch.distributed": {
            "CudaRNGStatesTracker": CudaRNGStatesTracker,
            "checkpoint": None,
            "activation_recompute_forward": contextlib.nullcontext,
            "is_fp8_activation_recompute_enabled": lambda: False,
        },
        ".pytorch.fp8": {
            "FP8GlobalStateManager": FP8GlobalStateManager,
            "fp8_autocast": contextlib.nullcontext,
            "fp8_model_init": contextlib.nullcontext,
        },
        ".pytorch.module": {},
        ".pytorch.module.base": {"TransformerEngineBaseModule": TransformerEngineBaseModule},
        ".pytorch.module.linear": {"Linear": Linear, "_Linear": unused["_Linear"]},
        ".pytorch.module.layernorm_linear": {
            "LayerNormLinear": LayerNormLinear,
            "_LayerNormLinear": unused["_LayerNormLinear"],
        },
        ".pytorch.module.grouped_linear": {
            "GroupedLinear": GroupedLinear,
            "_GroupedLinear": unused["_Grouped"],
        },
        # Asked for when Megatron-Core's fused classes are defined, which nobody uses here.
        ".pytorch.ops": {"__getattr__": _undefined},
        ".pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (), {})},
    }
    for suffix, names in contents.items():
        name = f"transformer_engine{suffix}"
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(names)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
