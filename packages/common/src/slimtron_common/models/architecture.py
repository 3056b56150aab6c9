"""The shape of a language model, independent of the library that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slimtron_common.errors import ParallelismError

__all__ = ["Activation", "Architecture", "Hybrid", "MixtureOfExperts", "Normalization"]

Activation = Literal["swiglu", "geglu", "squared_relu"]
"""Of a feed-forward network. The first two are gated; geglu takes tanh's approximation of GELU."""

Normalization = Literal["rmsnorm", "rmsnorm1p", "layernorm1p"]
"""``1p``: what is stored and 1 together make the weight. Only layernorm1p has a bias."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureOfExperts:
    """Every layer's feed-forward network as one of many, chosen token by token."""

    num_experts: int
    experts_per_token: int
    normalized: bool = True
    """Whether the weights of a token's experts sum to 1; if not, they are the experts' shares of
    a softmax over all experts."""

    shared_ffn_hidden_size: int | None = None
    """Inner width of an expert that serves all tokens, each as much as a gate lets it; None
    without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hybrid:
    """Layers of different kinds, one part each, without position embeddings.

    A Mamba layer is a Mamba-2 block (arXiv:2405.21060) with a norm of its own before the last
    projection.
    """

    pattern: str
    """The layers in their order: ``M`` a Mamba layer, ``*`` attention, ``-`` feed-forward."""

    mamba_num_heads: int
    mamba_head_dim: int
    mamba_num_groups: int
    """Groups of heads that share their projections B and C of the state."""

    mamba_state_dim: int
    """Numbers that each channel of a head remembers."""

    conv_kernel: int = 4
    """Tokens that the convolution looks back on, its own included."""

    @property
    def inner_size(self) -> int:
        """Width of all Mamba heads together."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def states_size(self) -> int:
        """Width of B of all groups together, equal to that of C."""
        return self.mamba_num_groups * self.mamba_state_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A decoder-only transformer with RoPE and grouped queries, or a hybrid with Mamba layers."""

    family: str
    """Hugging Face's ``model_type``, a key of ``FAMILIES``."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Inner width of a feed-forward network, of each one in a mixture of experts."""

    num_attention_heads: int
    num_query_groups: int
    """Key/value heads; each serves ``num_attention_heads / num_query_groups`` query heads."""

    head_dim: int
    vocab_size: int
    """True vocabulary; Megatron pads it to a multiple of the tensor-parallel size."""

    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    rotary_scaling_factor: float | None = None
    """Llama 3's long-context factor; None without scaling."""

    rotary_interpolation: float | None = None
    """Linear position interpolation: positions are divided by this; None without."""

    rotary_fraction: float = 1.0
    """Part of each head's channels, from the first on, that is rotated."""

    activation: Activation = "swiglu"
    normalization: Normalization = "rmsnorm"
    moe: MixtureOfExperts | None = None
    """None for a dense model."""

    hybrid: Hybrid | None = None
    """None for a transformer, each layer of which is attention and a feed-forward network."""

    tied_embeddings: bool = False
    """Whether the output layer is the transposed embedding."""

    scaled_embeddings: bool = False
    """Whether embeddings are multiplied by the root of the hidden size (Gemma)."""

    qkv_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys are normalised per head (Qwen3)."""

    sliding_window: int | None = None
    """Tokens a query looks back on, itself included; None looks back on all."""

    dtype: str = "bfloat16"
    """Type of the stored weights, by torch's name."""

    hf_extras: Mapping[str, Any] = field(default_factory=dict)
    """What else ``config.json`` said (token ids and the like), kept for writing it again."""

    def layers_with(self, part: Literal["attention", "mlp", "mamba"]) -> list[int]:
        """Numbers, from 0, of the layers that have a part."""
        if self.hybrid is None:
            return [] if part == "mamba" else list(range(self.num_layers))
        letter = {"attention": "*", "mlp": "-", "mamba": "M"}[part]
        return [n for n, kind in enumerate(self.hybrid.pattern) if kind == letter]

    @property
    def gated(self) -> bool:
        """Whether a feed-forward network multiplies two projections of its input."""
        return self.activation in ("swiglu", "geglu")

    @property
    def query_size(self) -> int:
        """Width of all query heads together: the input width of the attention's projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together, equal to that of all value heads."""
        return self.num_query_groups * self.head_dim

    @property
    def num_expert_parameters(self) -> int:
        """Weights of all experts that tokens are sent to, of all layers; 0 for a dense model."""
        matrices = 3 if self.gated else 2
        size = matrices * self.hidden_size * self.ffn_hidden_size
        return self.num_layers * self.moe.num_experts * size if self.moe else 0

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Vocabulary rounded up to a multiple of ``tensor_parallel_size``."""
        return -(-self.vocab_size // tensor_parallel_size) * tensor_parallel_size

    @property
    def tensor_parallel_sizes(self) -> list[int]:
        """Numbers of processes that the weight matrices can be cut over."""
        sizes = range(1, self.num_query_groups + 1)
        return [n for n in sizes if not any(count % n for count in self._tensor_cuts.values())]

    @property
    def pipeline_parallel_sizes(self) -> list[int]:
        """Numbers of pipeline stages that the layers can be shared out to, one or more to each.

        Of a hybrid, which Megatron-Core cuts into equal parts, the divisors.
        """
        return _divisors(self.num_layers) if self.hybrid else list(range(1, self.num_layers + 1))

    def stage_layers(self, pipeline_parallel_size: int) -> list[int]:
        """Number of layers of each pipeline stage; the first ones get what is left over."""
        each, over = divmod(self.num_layers, pipeline_parallel_size)
        return [each + (stage < over) for stage in range(pipeline_parallel_size)]

    @property
    def expert_parallel_sizes(self) -> list[int]:
        """Numbers of processes that the experts can be shared out to; 1 for a dense model."""
        return _divisors(self.moe.num_experts if self.moe else 1)

    def check_parallel(
        self,
        *,
        tensor_parallel_size: int,
        pipeline_parallel_size: int,
        expert_parallel_size: int = 1,
        virtual_pipeline_size: int = 1,
    ) -> None:
        """Refuses a layout that this model cannot be cut into.

        Args:
            tensor_parallel_size: Processes that share every matrix.
            pipeline_parallel_size: Stages, which may have unequally many layers.
            expert_parallel_size: Processes that share out the experts.
            virtual_pipeline_size: Chunks of the model on each stage, equally large if several.

        Raises:
            ParallelismError: With the dimension that does not divide.
        """
        for name, count in self._tensor_cuts.items():
            if count % tensor_parallel_size:
                raise ParallelismError(
                    f"tensor parallelism must divide the model's {count} {name}",
                    where="parallel.tensor_parallel_size",
                    found=tensor_parallel_size,
                    allowed=", ".join(map(str, self.tensor_parallel_sizes)),
                )
        if pipeline_parallel_size not in self.pipeline_parallel_sizes:
            raise ParallelismError(
                f"every pipeline stage needs equally many of the hybrid's {self.num_layers} layers"
                if self.hybrid
                else f"every pipeline stage needs one of the model's {self.num_layers} layers",
                where="parallel.pipeline_parallel_size",
                found=pipeline_parallel_size,
                allowed=", ".join(map(str, self.pipeline_parallel_sizes))
                if self.hybrid
                else f"1 to {self.num_layers}",
            )
        chunks = pipeline_parallel_size * virtual_pipeline_size
        if virtual_pipeline_size > 1 and self.num_layers % chunks:
            raise ParallelismError(
                f"an interleaved pipeline cuts the model's {self.num_layers} layers into equal "
                f"chunks, {virtual_pipeline_size} on each of {pipeline_parallel_size} stages",
                where="virtual_pipeline_size",
                found=virtual_pipeline_size,
                allowed=f"numbers of chunks, {chunks} here, that divide the layers",
            )
        if expert_parallel_size not in self.expert_parallel_sizes:
            raise ParallelismError(
                f"expert parallelism must divide the model's {self.moe.num_experts} experts"
                if self.moe
                else "expert parallelism shares out experts, and this model is dense",
                where="parallel.expert_parallel_size",
                found=expert_parallel_size,
                allowed=", ".join(map(str, self.expert_parallel_sizes)),
            )

    @property
    def _tensor_cuts(self) -> dict[str, int]:
        """What tensor parallelism shares out, by its name for messages."""
        cuts = {
            "attention heads": self.num_attention_heads,
            "key/value heads (query groups)": self.num_query_groups,
            "feed-forward channels": self.ffn_hidden_size,
        }
        if self.moe and self.moe.shared_ffn_hidden_size:
            cuts["channels of the shared expert"] = self.moe.shared_ffn_hidden_size
        if self.hybrid:
            cuts["Mamba heads"] = self.hybrid.mamba_num_heads
            cuts["groups of Mamba heads"] = self.hybrid.mamba_num_groups
        return cuts


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
