"""The shape of a language model, independent of the library that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slimtron_common.errors import ParallelismError

__all__ = ["Architecture"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A decoder-only transformer of the Llama family: RMSNorm, RoPE, grouped queries, SwiGLU."""

    family: str
    """Hugging Face's ``model_type``: llama, mistral, qwen2 or qwen3."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
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

    tied_embeddings: bool = False
    """Whether the output layer is the transposed embedding."""

    qkv_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys are normalised per head (Qwen3)."""

    sliding_window: int | None = None
    """Tokens a query looks back on, itself included; None looks back on all."""

    dtype: str = "bfloat16"
    """Type of the stored weights, by torch's name."""

    hf_extras: Mapping[str, Any] = field(default_factory=dict)
    """What else ``config.json`` said (token ids and the like), kept for writing it again."""

    @property
    def query_size(self) -> int:
        """Width of all query heads together: the input width of the attention's projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together, equal to that of all value heads."""
        return self.num_query_groups * self.head_dim

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
        """Numbers of pipeline stages that the layers can be shared out to."""
        return [n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0]

    def check_parallel(self, *, tensor_parallel_size: int, pipeline_parallel_size: int) -> None:
        """Refuses a layout that this model cannot be cut into.

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
                f"pipeline parallelism must divide the model's {self.num_layers} layers",
                where="parallel.pipeline_parallel_size",
                found=pipeline_parallel_size,
                allowed=", ".join(map(str, self.pipeline_parallel_sizes)),
            )

    @property
    def _tensor_cuts(self) -> dict[str, int]:
        """What tensor parallelism shares out, by its name for messages."""
        return {
            "attention heads": self.num_attention_heads,
            "key/value heads (query groups)": self.num_query_groups,
            "feed-forward channels": self.ffn_hidden_size,
        }
