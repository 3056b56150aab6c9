"""The families of models that can be opened, and what tells each from a Llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What all models of one Hugging Face ``model_type`` have in common."""

    hf_class: str
    """The class in ``architectures``."""

    traits: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``Architecture`` in which it differs from a Llama."""

    norm_epsilon: str = "rms_norm_eps"
    """Name of the field in ``config.json``, as the next four."""

    hidden_act: str = "hidden_act"
    ffn_hidden_size: str = "intermediate_size"
    num_experts: str | None = None
    """None for a dense family."""

    shared_ffn_hidden_size: str | None = None
    """None for a family without an expert that serves all tokens."""

    tied_embeddings: bool = False
    """What an absent ``tie_word_embeddings`` means."""

    rotary_base: float = 10000.0
    """What an absent ``rope_theta`` means."""

    rotary_fraction: float = 1.0
    """What an absent ``partial_rotary_factor`` means; where it is 1, nothing else is known."""

    is_hybrid: bool = False
    """Whether layers are of different kinds, some of them Mamba."""

    embedding: str = "model.embed_tokens"
    """Its name among the tensors."""

    embedding_alias: str | None = None
    """Another name that some version of transformers writes."""

    layers: str = "model.layers"
    final_norm: str = "model.norm"
    mlp: str = "mlp"
    """A transformer's feed-forward network, within its layer."""

    up: tuple[str, ...] = ("gate_proj", "up_proj")
    """Names of its projections to the inner width, the gate first."""

    down: str = "down_proj"


FAMILIES: Mapping[str, Family] = {
    "llama": Family(hf_class="LlamaForCausalLM"),
    "mistral": Family(hf_class="MistralForCausalLM"),
    "qwen2": Family(hf_class="Qwen2ForCausalLM", traits={"qkv_bias": True}),
    "qwen3": Family(hf_class="Qwen3ForCausalLM", traits={"qk_norm": True}),
    "mixtral": Family(
        hf_class="MixtralForCausalLM",
        num_experts="num_local_experts",
        rotary_base=1e6,
        mlp="block_sparse_moe",
        up=("w1", "w3"),
        down="w2",
    ),
    "qwen3_moe": Family(
        hf_class="Qwen3MoeForCausalLM",
        traits={"qk_norm": True},
        ffn_hidden_size="moe_intermediate_size",
        num_experts="num_experts",
    ),
    "qwen2_moe": Family(
        hf_class="Qwen2MoeForCausalLM",
        traits={"qkv_bias": True},
        ffn_hidden_size="moe_intermediate_size",
        num_experts="num_experts",
        shared_ffn_hidden_size="shared_expert_intermediate_size",
    ),
    "gemma": Family(
        hf_class="GemmaForCausalLM",
        traits={"activation": "geglu", "normalization": "rmsnorm1p", "scaled_embeddings": True},
        tied_embeddings=True,
    ),
    "nemotron": Family(
        hf_class="NemotronForCausalLM",
        traits={"activation": "squared_relu", "normalization": "layernorm1p"},
        norm_epsilon="norm_eps",
        rotary_fraction=0.5,
        up=("up_proj",),
    ),
    "nemotron_h": Family(
        hf_class="NemotronHForCausalLM",
        traits={"activation": "squared_relu"},
        norm_epsilon="layer_norm_epsilon",
        hidden_act="mlp_hidden_act",
        is_hybrid=True,
        embedding="backbone.embeddings",
        embedding_alias="backbone.embedding",
        layers="backbone.layers",
        final_norm="backbone.norm_f",
        up=("up_proj",),
    ),
}
"""By Hugging Face's ``model_type``."""
