"""mamba_ssm's kernels and the scan in plain torch compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.integrations.mamba import import_mamba_mixer
from slimtron_common.integrations.mamba_scan import split_conv_scan
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import forward_only, initialize_parallel
from slimtron_common.testing import write_tiny_model

TOKENS = torch.randint(0, 299, (2, 300), generator=torch.Generator().manual_seed(0))


def test_the_kernel_is_used_and_computes_what_the_reference_does() -> None:
    pytest.importorskip("mamba_ssm")
    heads, width, groups, states = 8, 64, 2, 16
    inner, convolved = heads * width, heads * width + 2 * groups * states
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    arguments = (
        draw(2, 300, inner + convolved + heads),
        draw(convolved, 4),
        draw(convolved),
        draw(heads),
        -draw(heads).exp(),
    )
    skip = draw(heads)
    scan = import_mamba_mixer().mamba_split_conv1d_scan_combined
    found = scan(
        *arguments,
        D=skip,
        chunk_size=128,
        activation="silu",
        headdim=width,
        ngroups=groups,
        norm_before_gate=False,
        seq_idx=None,
    )
    expected = split_conv_scan(
        *arguments, skip=skip, num_groups=groups, head_dim=width, chunk_size=128
    )
    # The kernel multiplies in TF32.
    assert float((found - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("layer_spec", ["local", "transformer_engine"])
def test_a_hybrid_on_the_gpu_is_that_on_the_cpu(layer_spec: str, tmp_path: Path) -> None:
    """Whether the kernels are installed or not; three chunks of the scan."""
    if layer_spec == "transformer_engine":
        pytest.importorskip("transformer_engine")
    # Kernels want a head of 16 channels or more.
    path = write_tiny_model(tmp_path / "m", "nemotron_h", tokenizer=False, mamba_head_dim=64)
    checkpoint = open_checkpoint(f"hf:{path}")
    logits = {}
    for device in ("cuda", "cpu"):
        spec = layer_spec if device == "cuda" else "local"
        with initialize_parallel(device=device) as context:
            model = build_model(
                checkpoint.architecture,
                context,
                dtype=torch.float32,
                layer_spec=spec,  # type: ignore[arg-type]
            )
            checkpoint.load(model, context)
            forward_only(
                model,
                [TOKENS],
                context,
                lambda _, x, name=device: logits.update({name: x.float().cpu().clone()}),
            )
    assert float((logits["cuda"] - logits["cpu"]).norm() / logits["cpu"].norm()) < 1e-2
