"""The scales of the KV cache in every layout are those of one process."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelConfig, initialize_parallel
from slimtron_common.testing import run_ranks, write_tiny_model
from slimtron_quant import ExportConfig, QuantizationConfig, Quantizer, calibration_loop
from slimtron_quant.calibration.state import save_calibration
from slimtron_quant.export.reader import ExportedModel

RECIPES = (None, "fp8", "int4_awq")


def _export_all(
    rank: int, world_size: int, model_dir: Path, out: Path, layout: ParallelConfig
) -> None:
    checkpoint = open_checkpoint(f"hf:{model_dir}")
    sequences = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(3))
    with initialize_parallel(layout, device="cpu") as context:
        batches = list(sequences[context.dp_rank :: context.dp_size].split(2))
        for recipe in RECIPES:
            model = build_model(checkpoint.architecture, context, dtype=torch.float32)
            checkpoint.load(model, context)
            config = QuantizationConfig(recipe, awq_block_size=16, enable_kv_cache=True)
            quantizer = Quantizer(config, ExportConfig(out / str(recipe), dtype=32))
            quantizer.quantize(model, calibration_loop(batches, context))
            quantizer.export(model, model_dir)
        # A model that is calibrated no more, and one that is read back, compute the same.
        save_calibration(out, model, context)
        context.barrier()
        again = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(again, context)
        quantizer.restore(again, out, context)
        states = [
            {k: v for k, v in m.state_dict().items() if "bmm_quantizer" in k and v is not None}
            for m in (model, again)
        ]
        assert states[0].keys() == states[1].keys() != set()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        exported = ExportedModel(out / "None")
        exported.check_values()
        exported.build(context, dtype=torch.float32)


def test_scales_equal_those_of_one_process(tmp_path: Path) -> None:
    model = write_tiny_model(
        tmp_path / "model", num_hidden_layers=2, vocab_size=300, tie_word_embeddings=True
    )
    # Keys and values beyond the range of FP8, so that no scale is 1, in one head the most.
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            tensor *= 2e4
            tensor[-16:] *= 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    layouts = {
        "one": ParallelConfig(),
        "tp2-pp2": ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2),
        "dp2": ParallelConfig(),
    }
    for name, layout in layouts.items():
        (tmp_path / name).mkdir()
        world_size = 2 if name == "dp2" else layout.model_parallel_size
        run_ranks(_export_all, world_size, model, tmp_path / name, layout)
    for recipe in map(str, RECIPES):
        scales = {}
        for name in layouts:
            files = (tmp_path / name / recipe).glob("*.safetensors")
            written = {k: v for file in files for k, v in load_file(file).items()}
            scales[name] = {k: v for k, v in written.items() if k.endswith(("k_scale", "v_scale"))}
        assert len(scales["one"]) == 4
        for name in layouts:
            assert scales[name].keys() == scales["one"].keys()
            for key, scale in scales["one"].items():
                assert scale > 1
                # Partial sums are added in another order.
                torch.testing.assert_close(scales[name][key], scale, rtol=1e-3, atol=0)
        for file in ("config.json", "hf_quant_config.json"):
            texts = {(tmp_path / name / recipe / file).read_text() for name in layouts}
            assert len(texts) == 1
