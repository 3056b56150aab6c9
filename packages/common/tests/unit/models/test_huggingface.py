from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from slimtron_common.errors import CheckpointError, UnsupportedModelError
from slimtron_common.models import Architecture
from slimtron_common.models.architecture import Hybrid, MixtureOfExperts
from slimtron_common.models.families import FAMILIES
from slimtron_common.models.huggingface import architecture_from_config, config_from_architecture

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 301,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 3e-6,
    "hidden_act": "silu",
    "bos_token_id": 7,
    "eos_token_id": [8, 9],
    "tie_word_embeddings": True,
}

OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
        "intermediate_size": 128,
    },
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 48,
        "intermediate_size": 128,
    },
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "pad_token_id": 0},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 3e-6},
    "nemotron_h": {
        "mlp_hidden_act": "relu2",
        "layer_norm_epsilon": 1e-5,
        "hybrid_override_pattern": "M*-M",
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 16,
    },
}
"""Where a family's config has other fields or values."""

HYBRID = Hybrid(
    pattern="M*-M", mamba_num_heads=4, mamba_head_dim=8, mamba_num_groups=2, mamba_state_dim=16
)

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(family: str = "llama", **changes: Any) -> dict[str, Any]:
    known = FAMILIES.get(family)
    head = {"model_type": family, "architectures": [known.hf_class if known else "Unknown"]}
    return {**head, **SHAPE, **OWN.get(family, {}), **changes}


def read(config: dict[str, Any]) -> Architecture:
    return architecture_from_config(config, source="DIR/config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_the_shape(family: str) -> None:
    a = read(config_of(family, torch_dtype="float16", rope_theta=5e5))
    assert a.family == family
    assert (a.num_layers, a.hidden_size, a.ffn_hidden_size) == (4, 64, 96)
    assert (a.num_attention_heads, a.num_query_groups, a.head_dim) == (4, 2, 32)
    assert (a.vocab_size, a.max_position_embeddings) == (301, 16384)
    if family == "nemotron_h":
        assert (a.hybrid, a.norm_epsilon) == (HYBRID, 1e-5)
    else:
        assert (a.hybrid, a.norm_epsilon, a.rotary_base) == (None, 3e-6, 5e5)
    assert (a.tied_embeddings, a.dtype) == (True, "float16")
    assert (a.qkv_bias, a.qk_norm) == (family.startswith("qwen2"), family.startswith("qwen3"))
    assert a.scaled_embeddings == (family == "gemma")
    assert a.rotary_fraction == (0.5 if family == "nemotron" else 1.0)
    assert (a.hf_extras["bos_token_id"], a.hf_extras["eos_token_id"]) == (7, [8, 9])
    # What the shape is made of would be written twice.
    assert a.hf_extras.keys() <= {
        "bos_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps", "intermediate_size",
        "hidden_act",
    }  # fmt: skip
    experts = {
        "mixtral": MixtureOfExperts(num_experts=8, experts_per_token=2),
        "qwen3_moe": MixtureOfExperts(num_experts=8, experts_per_token=3),
        "qwen2_moe": MixtureOfExperts(
            num_experts=8, experts_per_token=3, normalized=False, shared_ffn_hidden_size=48
        ),
    }
    assert a.moe == experts.get(family)


def test_experts_of_qwen3() -> None:
    read_moe = lambda **changes: read(config_of("qwen3_moe", **changes)).moe  # noqa: E731
    assert read_moe(norm_topk_prob=False) == MixtureOfExperts(
        num_experts=8, experts_per_token=3, normalized=False
    )
    assert read_moe(norm_topk_prob=False, num_experts_per_tok=1).experts_per_token == 1
    # As transformers 5 writes it.
    five = config_of("qwen3_moe", num_local_experts=8)
    del five["num_experts"]
    assert read(five) == read(config_of("qwen3_moe"))
    # No layer uses it, and it travels along.
    assert config_from_architecture(read(five))["intermediate_size"] == 128


def test_layers_of_a_hybrid_by_all_their_names() -> None:
    for layers in (
        ["mamba", "attention", "mlp", "mamba"],
        ["linear_attention", "full_attention", "mlp", "linear_attention"],
    ):
        config = config_of("nemotron_h", layers_block_type=layers)
        del config["hybrid_override_pattern"], config["num_hidden_layers"]
        assert read(config).hybrid == HYBRID
    # As transformers 5 writes it.
    unlimited = config_of("nemotron_h", time_step_limit=[0.0, {"__float__": "Infinity"}])
    assert read(unlimited).hybrid == HYBRID
    # As transformers without a field, not as a Llama.
    config = config_of("nemotron_h", head_dim=None, time_step_limit=None)
    assert (read(config).head_dim, read(config).num_layers) == (128, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": "ME*-"}, "layers of a kind"),
        ({"hybrid_override_pattern": "*-*-"}, "no Mamba layer"),
        ({"hybrid_override_pattern": None}, "does not say what its layers are"),
        ({"mamba_num_heads": 5}, "n_groups must divide"),
        ({"mamba_head_dim": 0}, "mamba_head_dim"),
        ({"time_step_limit": [0.01, 1.0]}, "time_step_limit"),
        ({"conv_kernel": 3}, "conv_kernel"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"use_bias": True}, "use_bias"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
    ],
)
def test_hybrids_of_other_kinds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError), match=message):
        read(config_of("nemotron_h", **changes))


def test_absent_fields_of_other_families() -> None:
    gemma, nemotron, mixtral = (config_of(name) for name in ("gemma", "nemotron", "mixtral"))
    del gemma["tie_word_embeddings"], gemma["hidden_act"]
    assert read(gemma) == read(config_of("gemma"))
    assert read(nemotron).rotary_base == 1e4
    assert read({**nemotron, "partial_rotary_factor": 0.25}).rotary_fraction == 0.25
    five = {"rope_theta": 1e4, "partial_rotary_factor": 0.25}
    assert read({**nemotron, "rope_parameters": five}).rotary_fraction == 0.25
    assert (read(mixtral).rotary_base, read(mixtral).sliding_window) == (1e6, None)


def test_absent_fields_take_transformers_defaults() -> None:
    config = config_of()
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        del config[name]
    a = read(config)
    theirs = transformers.LlamaConfig(**{k: v for k, v in config.items() if k in SHAPE})
    assert a.num_query_groups == theirs.num_key_value_heads
    assert a.head_dim == theirs.head_dim
    assert a.norm_epsilon == theirs.rms_norm_eps
    assert a.tied_embeddings == theirs.tie_word_embeddings
    # transformers 5 holds it in `rope_parameters`; 4 has a field.
    rope = getattr(theirs, "rope_parameters", None) or {"rope_theta": theirs.rope_theta}
    assert a.rotary_base == rope["rope_theta"]
    assert a.dtype == "float32"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 2e4}, {"rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}}),
        (
            {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_parameters": {"rope_theta": 2e4, "rope_type": "linear", "factor": 4.0}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
        ),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ],
)
def test_transformers_4_and_5_say_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert read(config_of(**old)) == read(config_of(**new))


def test_rotary_scaling() -> None:
    assert read(config_of()).rotary_scaling_factor is None
    linear = read(config_of(rope_scaling={"rope_type": "linear", "factor": 4}))
    assert (linear.rotary_interpolation, linear.rotary_scaling_factor) == (4.0, None)
    llama3 = read(config_of(rope_scaling={"rope_type": "llama3", **LLAMA3}))
    assert (llama3.rotary_interpolation, llama3.rotary_scaling_factor) == (None, 32.0)
    # Says nothing beyond the default.
    named = {"rope_type": "default", "partial_rotary_factor": 1.0, "factor": None}
    assert read(config_of(rope_parameters=named)) == read(config_of())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "gemma"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": None},
        {"sliding_window": 8},
        {"sliding_window": 8, "use_sliding_window": True},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4},
        {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 4},
        {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 4},
    ],
    ids=str,
)
def test_sliding_window_is_that_of_transformers(family: str, changes: dict[str, Any]) -> None:
    if family in ("mistral", "mixtral", "gemma"):
        # Has no such field, and transformers 5 warns of it.
        changes = {name: value for name, value in changes.items() if name != "layer_types"}
    config = config_of(family, **changes)
    theirs = transformers.AutoConfig.for_model(**config)
    expected = None if family in ("llama", "gemma") else theirs.sliding_window
    if family.startswith("qwen") and set(theirs.layer_types) == {"full_attention"}:
        expected = None
    assert read(config).sliding_window == expected


def _refused() -> dict[str, dict[str, Any]]:
    return {
        "another mixture of experts": config_of("deepseek_v2"),
        "dense layers between": config_of("qwen3_moe", decoder_sparse_step=2),
        "a dense layer": config_of("qwen3_moe", mlp_only_layers=[0]),
        "no biases in Qwen2": config_of("qwen2_moe", qkv_bias=False),
        "window in a sparse Qwen": config_of("qwen3_moe", use_sliding_window=True),
        "one expert of weight 1": config_of("mixtral", num_experts_per_tok=1),
        "one expert of weight 1, Qwen": config_of("qwen3_moe", num_experts_per_tok=1),
        "exact GELU": config_of("gemma", hidden_act="gelu"),
        "exact GELU, said twice": config_of("gemma", hidden_activation="gelu"),
        "a view on what comes": config_of("gemma", use_bidirectional_attention=True),
        "attention_bias of Nemotron": config_of("nemotron", attention_bias=True),
        "mlp_bias of Nemotron": config_of("nemotron", mlp_bias=True),
        "gated Nemotron": config_of("nemotron", hidden_act="silu"),
        "another head": config_of(architectures=["LlamaForSequenceClassification"]),
        "a name, not a list": config_of(architectures="LlamaForCausalLM"),
        "no model_type": {"architectures": ["LlamaForCausalLM"]},
        "a list for a model_type": config_of(model_type=["llama"]),
        "quantized": config_of(quantization_config={"quant_method": "awq"}),
        "quantized, oddly": config_of(quantization_config=["awq"]),
        "attention_bias": config_of(attention_bias=True),
        "attention_bias of Qwen3": config_of("qwen3", attention_bias=True),
        "mlp_bias": config_of(mlp_bias=True),
        "gelu": config_of(hidden_act="gelu"),
        "part of a head turned": config_of(partial_rotary_factor=0.5),
        "yarn": config_of(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "dynamic": config_of(rope_scaling={"type": "dynamic", "factor": 4.0}),
        "linear, no factor": config_of(rope_scaling={"rope_type": "linear"}),
        "other Llama 3": config_of(
            rope_scaling={"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0}
        ),
        "part of a head turned, transformers 5": config_of(
            rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}
        ),
        "one RoPE a layer type": config_of(
            rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
        ),
        "window in some layers": config_of(
            "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2
        ),
        "window in every other layer": config_of(
            "qwen3",
            use_sliding_window=True,
            sliding_window=8,
            layer_types=["full_attention", "sliding_attention"] * 2,
        ),
    }


@pytest.mark.parametrize("name", _refused())
def test_unsupported_models_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read(_refused()[name])
    assert caught.value.where == "DIR/config.json"
    assert caught.value.exit_code == 2
    assert "found" in str(caught.value)


def test_a_quantized_model_is_named_as_such() -> None:
    with pytest.raises(UnsupportedModelError, match="already quantized") as caught:
        read(config_of(quantization_config={"quant_method": "compressed-tensors"}))
    assert "compressed-tensors" in str(caught.value.found)
    # null says that it is not.
    assert read(config_of(quantization_config=None)) == read(config_of())


@pytest.mark.parametrize("name", [n for n, v in SHAPE.items() if type(v) is int and "id" not in n])
@pytest.mark.parametrize("value", ["64", 0, -4, 4.0, True, [4]], ids=repr)
def test_sizes_must_be_positive_integers(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=name):
        read(config_of(**{name: value}))


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_sizes_without_default_must_be_there(name: str) -> None:
    config = config_of()
    del config[name]
    with pytest.raises(CheckpointError, match=name):
        read(config)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps"),
        ("llama", {"rope_theta": "1e4"}, "rope_theta"),
        ("llama", {"rope_theta": float("inf")}, "rope_theta"),
        ("llama", {"rope_scaling": "linear"}, "rotary parameters"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "4"}}, "factor"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ("llama", {"num_key_value_heads": 3}, "must divide"),
        ("mistral", {"sliding_window": "8"}, "sliding_window"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("mixtral", {"num_experts_per_tok": 9}, "more experts than there are"),
        ("qwen3_moe", {"num_experts": None}, "num_experts"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ("qwen3_moe", {"moe_intermediate_size": 1.5}, "moe_intermediate_size"),
        ("nemotron", {"partial_rotary_factor": 2}, "partial_rotary_factor"),
        ("nemotron", {"norm_eps": 0}, "norm_eps"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "0"}, "max_window_layers"),
    ],
)
def test_fields_of_a_wrong_type_are_named(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(config_of(family, **changes))
    assert caught.value.where == "DIR/config.json"


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_theta": 1e5, "tie_word_embeddings": False}),
    "llama 3": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 with window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", {"rope_theta": 1e6}),
    "mixtral": ("mixtral", {"rope_theta": 1e5}),
    "mixtral with window": ("mixtral", {"sliding_window": 8}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, not normalized": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, normalized": ("qwen2_moe", {"norm_topk_prob": True}),
    "gemma": ("gemma", {}),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.25}),
    "nemotron_h": ("nemotron_h", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_means_the_same_to_transformers(name: str, tmp_path: Path) -> None:
    family, changes = CASES[name]
    config = config_of(family, **changes)
    original = transformers.AutoConfig.for_model(**config)
    original.save_pretrained(tmp_path / "original")
    saved = json.loads((tmp_path / "original" / "config.json").read_text())
    architecture = read({**config_of(family), **saved})

    (tmp_path / "ours").mkdir()
    written = config_from_architecture(architecture, dtype="float16")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(written))
    ours = transformers.AutoConfig.from_pretrained(tmp_path / "ours")

    assert type(ours) is type(original)
    assert ours.dtype is torch.float16
    differing = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    if architecture.sliding_window is None:
        # Where no layer looks through a window, its size and first layer say nothing.
        differing |= {"max_window_layers", "sliding_window"}
    if architecture.hybrid:
        # A field of the others.
        differing.add("hidden_act")
    after, before = ours.to_dict(), original.to_dict()
    for key in before.keys() - differing:
        assert after[key] == before[key], key
    assert getattr(ours, "sliding_window", None) == getattr(original, "sliding_window", None)
    # Reading what was written gives the same model again.
    assert read({**written, "torch_dtype": architecture.dtype}) == architecture


def test_unknown_fields_travel_along() -> None:
    architecture = read(config_of(pad_token_id=3, some_engine={"depth": [1, 2]}))
    written = config_from_architecture(architecture)
    assert written["some_engine"] == {"depth": [1, 2]}
    assert written["pad_token_id"] == 3
    assert written["eos_token_id"] == [8, 9]
