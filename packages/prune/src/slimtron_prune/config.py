"""What to prune a model to, under the names and with the meaning of NeMo 2's ``llm.modelopt``."""

from __future__ import annotations

from dataclasses import dataclass, fields

from slimtron_common.errors import ConfigError

__all__ = ["PruningConfig"]


@dataclass(frozen=True, slots=True)
class PruningConfig:
    """Sizes of the smaller model. None leaves a dimension as it is."""

    target_ffn_hidden_size: int | None = None
    """Inner width of a dense model's feed-forward networks."""

    target_hidden_size: int | None = None
    """Width of the residual stream: embeddings, norms, and both ends of every layer."""

    target_num_attention_heads: int | None = None
    """Query heads; their width stays. Goes together with ``target_num_query_groups``."""

    target_num_query_groups: int | None = None
    """Key/value heads. Of each group that is kept, as many query heads are kept."""

    target_mamba_num_heads: int | None = None
    """Heads of Mamba layers; of each group, as many are kept."""

    target_mamba_head_dim: int | None = None
    """Width of a head of Mamba layers; each head keeps its own best channels."""

    target_num_layers: int | None = None
    """Layers; the least important go."""

    drop_layers: list[int] | None = None
    """The layers that go, counted from 1. Excludes the other targets, and needs no text."""

    target_num_moe_experts: int | None = None
    """Experts of each layer, among which as many as before serve a token."""

    target_moe_ffn_hidden_size: int | None = None
    """Inner width of each expert."""

    target_moe_shared_expert_intermediate_size: int | None = None
    """Inner width of the expert that serves all tokens."""

    def __post_init__(self) -> None:
        for name, value in self.targets.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError("is no size", where=name, found=value, allowed="1 or more")
        if self.drop_layers is not None:
            self._check_drop_layers()
        elif (self.target_num_attention_heads is None) != (self.target_num_query_groups is None):
            given, missing = "target_num_attention_heads", "target_num_query_groups"
            if self.target_num_attention_heads is None:
                given, missing = missing, given
            raise ConfigError(
                f"goes together with {missing}: a query head belongs to a key/value head",
                where=given,
                found=getattr(self, given),
                hint=f"set {missing}, too; to the model's own number if it shall stay",
            )

    @property
    def targets(self) -> dict[str, int]:
        """The sizes that are set, by the name of their field."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "drop_layers" and getattr(self, field.name) is not None
        }

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be pruned."""
        return not self.targets and self.drop_layers is None

    def _check_drop_layers(self) -> None:
        dropped = self.drop_layers or []
        if self.targets:
            raise ConfigError(
                "drop_layers excludes the other targets",
                where="drop_layers",
                found=f"{dropped} with {', '.join(self.targets)}",
                hint="drop the layers first and prune the result, or use target_num_layers",
            )
        if not dropped:
            raise ConfigError(
                "names no layer",
                where="drop_layers",
                found=dropped,
                hint="list layers, counted from 1, or leave it out",
            )
        repeated = sorted({n for n in dropped if dropped.count(n) > 1})
        if repeated:
            raise ConfigError("names a layer twice", where="drop_layers", found=repeated)
        if min(dropped) < 1:
            raise ConfigError(
                "layers count from 1", where="drop_layers", found=min(dropped), allowed="1 or more"
            )
