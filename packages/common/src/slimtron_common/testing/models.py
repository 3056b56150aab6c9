"""Small models that transformers itself builds and saves, random but for their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["write_tiny_model"]

_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "qwen2_moe": "Qwen2Moe",
    "gemma": "Gemma",
    "nemotron": "Nemotron",
    "nemotron_h": "NemotronH",
}

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "qwen2_moe": {
        **_EXPERTS,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "nemotron": {"norm_eps": 1e-5},
    "nemotron_h": {
        "hybrid_override_pattern": "M-M*M-",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
        "use_mamba_kernels": False,
        # In plain torch, transformers takes it for a limit, which no kernel has.
        "time_step_min": 1e-8,
        # transformers 5.14 knows no cache for layers that need none.
        "use_cache": False,
    },
}
"""What a family's config has besides."""

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    # Far from the default, so that random layers matter and wrong wiring shows.
    "initializer_range": 0.15,
}


def write_tiny_model(
    directory: Path,
    family: str = "llama",
    *,
    dtype: str = "float32",
    seed: int = 0,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Writes a Hugging Face directory of about 0.2 million random parameters.

    Skips the test where transformers does not know the family.

    Args:
        directory: Where to; created.
        family: Hugging Face's ``model_type``, one of ``FAMILIES``.
        dtype: Type of the weights.
        seed: Seeds them.
        tokenizer: Whether to train a byte-level tokenizer on Python's help topics, too.
        **overrides: Fields of the model's config.

    Returns:
        ``directory``.
    """
    import pytest
    import torch
    import transformers

    name = _CLASSES[family]
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = getattr(transformers, f"{name}Config")(
        **{**_SHAPE, **_FIELDS.get(family, {}), **overrides}
    )
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Norms and biases of all ones and zeros would hide a swap.
                parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.set_rng_state(generator_state)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    if tokenizer:
        _write_tokenizer(directory, config.vocab_size)
    return directory


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)[:20]), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(
        directory
    )
