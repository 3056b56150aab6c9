"""What a distillation's file may say, and what is refused before any weights are read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slimtron_common.errors import ConfigError, ParallelismError
from slimtron_distill import DistillationConfig, LogitLossSettings, load_distillation_config
from slimtron_distill.layers import check_layer_pairs, parse_layer


def _model(num_layers: int, pipeline: int = 1, virtual: int | None = None) -> Any:
    return SimpleNamespace(
        num_layers=num_layers,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
    )


def test_defaults_are_those_of_nemo() -> None:
    config = load_distillation_config(None, _model(2), _model(4))
    assert config == DistillationConfig()
    assert config.logit_layers == ("output_layer", "output_layer")
    assert config.skip_lm_loss
    assert config.kd_loss_scale == 1.0
    assert config.intermediate_layer_pairs == ()


def test_a_file_reaches_every_field(tmp_path: Path) -> None:
    path = tmp_path / "kd.yaml"
    path.write_text(
        """
intermediate_layer_pairs:
  - [decoder.layers.1, decoder.layers.3]
  - [decoder.final_layernorm, decoder.final_layernorm]
logit_layers: [output_layer, output_layer]
skip_lm_loss: false
kd_loss_scale: 0.5
criterion: {kind: reverse_kl, temperature: 2.0}
loss_balancer: dynamic
intermediate_criterion: mse
""",
        encoding="utf-8",
    )
    config = load_distillation_config(str(path), _model(2), _model(4))
    assert config == DistillationConfig(
        intermediate_layer_pairs=(
            ("decoder.layers.1", "decoder.layers.3"),
            ("decoder.final_layernorm", "decoder.final_layernorm"),
        ),
        skip_lm_loss=False,
        kd_loss_scale=0.5,
        criterion=LogitLossSettings(kind="reverse_kl", temperature=2.0),
        loss_balancer="dynamic",
        intermediate_criterion="mse",
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"intermediate_layer_pairs": [["decoder.layers.0"]]}, "one layer of the student"),
        ({"intermediate_layer_pairs": [["decoder.layers.0", "layers.1"]]}, "layers.1"),
        ({"intermediate_layer_pairs": [["decoder.layers.1", "decoder.layers.1"]] * 2}, "twice"),
        ({"logit_layers": ["output_layer", "head"]}, "logit_layers"),
        ({"kd_loss_scale": 0.0}, "kd_loss_scale"),
        ({"kd_loss_scale": float("nan")}, "kd_loss_scale"),
        ({"intermediate_loss_scale": -1.0}, "intermediate_loss_scale"),
        ({"max_dynamic_scale": 1.0}, "max_dynamic_scale"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        DistillationConfig(**fields)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("kd_loss_scal: 2", "did you mean kd_loss_scale"),
        ("criterion: {temperature: 0}", "temperature"),
        ("loss_balancer: nemo", "loss_balancer"),
        ("intermediate_layer_pairs: [[decoder.layers.4, decoder.layers.3]]", "no such layer"),
    ],
)
def test_a_wrong_file_is_refused(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "kd.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=named):
        load_distillation_config(path, _model(4), _model(4))


def test_names_of_layers() -> None:
    assert parse_layer("decoder.layers.12") == (12, "")
    assert parse_layer("decoder.layers.1.mlp.linear_fc2") == (1, "mlp.linear_fc2")
    assert parse_layer("decoder.final_layernorm") == (None, "decoder.final_layernorm")


def test_a_pair_must_meet_on_a_stage() -> None:
    pairs = [("decoder.layers.1", "decoder.layers.3"), ("embedding", "decoder.layers.0")]
    check_layer_pairs(pairs, 4, 8, num_stages=4)
    with pytest.raises(ParallelismError, match=r"decoder.layers.1 on stage 1, .* on 2"):
        check_layer_pairs([("decoder.layers.1", "decoder.layers.4")], 4, 8, num_stages=4)
    with pytest.raises(ParallelismError, match="on stage 3"):
        check_layer_pairs([("decoder.final_layernorm", "embedding")], 4, 8, num_stages=4)


def test_a_model_shallower_than_the_pipeline_is_refused() -> None:
    with pytest.raises(ParallelismError, match="teacher's layers"):
        load_distillation_config(None, _model(8, 2, 2), _model(2, 2, 2))
