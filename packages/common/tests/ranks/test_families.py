"""Models other than Llamas, cut in every way, compute what transformers computes."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version

from slimtron_common.checkpoint import open_checkpoint, save_huggingface
from slimtron_common.checkpoint.megatron import save_megatron
from slimtron_common.models.megatron import architecture_of, build_model
from slimtron_common.parallel import ParallelConfig, forward_only, initialize_parallel
from slimtron_common.testing import run_ranks, write_tiny_model

MODELS = {
    "mixtral": ("mixtral", {"num_local_experts": 6}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": False}),
    "gemma": ("gemma", {"head_dim": 32, "vocab_size": 299}),
    "nemotron": ("nemotron", {}),
}
if hasattr(transformers, "NemotronHConfig"):
    MODELS["nemotron_h"] = ("nemotron_h", {})
MIXTURES = ["mixtral", "qwen3_moe"]
if Version(version("megatron-core")) >= Version("0.16"):
    MODELS["qwen2_moe"] = ("qwen2_moe", {})
    MIXTURES.append("qwen2_moe")

LAYOUTS = {
    "tp2": (2, ParallelConfig(tensor_parallel_size=2), list(MODELS)),
    "tp2-sp": (2, ParallelConfig(tensor_parallel_size=2, sequence_parallel=True), list(MODELS)),
    "pp2": (2, ParallelConfig(pipeline_parallel_size=2), list(MODELS)),
    "ep2": (2, ParallelConfig(expert_parallel_size=2), MIXTURES),
    "tp2-ep2": (4, ParallelConfig(tensor_parallel_size=2, expert_parallel_size=2), MIXTURES),
    "pp2-ep2": (4, ParallelConfig(pipeline_parallel_size=2, expert_parallel_size=2), MIXTURES),
    # Two copies of a model whose experts are shared out to two processes each.
    "ep2-dp4": (4, ParallelConfig(expert_parallel_size=2), MIXTURES),
}


def _tokens(dp_rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(dp_rank)
    # Processes that share experts out need not hold batches of one size.
    sizes = [(2, 16), (1 + dp_rank, 16)]
    return [torch.randint(0, 299, size, generator=generator) for size in sizes]


def _on_rank(
    rank: int, world_size: int, paths: list[Path], layout: ParallelConfig
) -> list[tuple[int, dict[int, torch.Tensor]]]:
    return [_run(path, layout) for path in paths]


def _run(path: Path, layout: ParallelConfig) -> tuple[int, dict[int, torch.Tensor]]:
    """Writes the model again beside ``path``; returns the logits of this process's batches."""
    checkpoint = open_checkpoint(f"hf:{path}")
    architecture = checkpoint.architecture
    with initialize_parallel(layout, device="cpu") as context:
        model = build_model(architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        assert architecture_of(model).family == architecture.family
        assert architecture_of(model).moe == architecture.moe
        assert architecture_of(model).hybrid == architecture.hybrid
        logits: dict[int, torch.Tensor] = {}
        forward_only(
            model, _tokens(context.dp_rank), context, lambda i, x: logits.update({i: x.clone()})
        )
        whole = {}
        for index, shard in logits.items():
            shards = [torch.empty_like(shard) for _ in range(context.tp_size)]
            dist.all_gather(shards, shard, group=context.tp_group)
            whole[index] = torch.cat(shards, -1)[..., : architecture.vocab_size]
        save_huggingface(path.with_name(f"{path.name}-again"), model, architecture, context)
        return context.dp_rank, whole


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_transformers_and_weights_come_back(tmp_path: Path, name: str) -> None:
    world_size, layout, models = LAYOUTS[name]
    paths = []
    for model in models:
        family, fields = MODELS[model]
        paths.append(write_tiny_model(tmp_path / model, family, tokenizer=False, **fields))
    results = run_ranks(_on_rank, world_size, paths, layout)
    for number, path in enumerate(paths):
        reference = transformers.AutoModelForCausalLM.from_pretrained(path)
        seen = set()
        for dp_rank, logits in (rank[number] for rank in results):
            for index, found in logits.items():
                with torch.no_grad():
                    expected = reference(_tokens(dp_rank)[index]).logits
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
                seen.add((dp_rank, index))
        replicas = world_size // layout.model_parallel_size
        assert seen == {(rank, index) for rank in range(replicas) for index in range(2)}

        again = path.with_name(f"{path.name}-again")
        before, after = (open_checkpoint(f"hf:{p}").tensors for p in (path, again))  # type: ignore[attr-defined]
        assert sorted(after.names) == sorted(before.names)
        for tensor in before.names:
            assert torch.equal(after.read(tensor), before.read(tensor)), tensor


def _save(rank: int, world_size: int, path: Path, layout: ParallelConfig) -> None:
    checkpoint = open_checkpoint(f"hf:{path}")
    with initialize_parallel(layout, device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        save_megatron(path.with_name("distributed"), model, checkpoint.architecture, context)


def _open_otherwise(rank: int, world_size: int, path: Path) -> None:
    checkpoint = open_checkpoint(f"megatron:{path.with_name('distributed')}")
    with initialize_parallel(ParallelConfig(tensor_parallel_size=2), device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        save_huggingface(path.with_name("back"), model, checkpoint.architecture, context)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3_moe", ParallelConfig(expert_parallel_size=2)),
        ("nemotron_h", ParallelConfig(pipeline_parallel_size=2)),
    ],
)
def test_a_distributed_checkpoint_opens_in_another_layout(
    family: str, layout: ParallelConfig, tmp_path: Path
) -> None:
    path = write_tiny_model(tmp_path / "model", family, tokenizer=False)
    run_ranks(_save, 2, path, layout)
    run_ranks(_open_otherwise, 2, path)
    before, after = (open_checkpoint(f"hf:{p}").tensors for p in (path, tmp_path / "back"))  # type: ignore[attr-defined]
    assert sorted(after.names) == sorted(before.names)
    for tensor in before.names:
        assert torch.equal(after.read(tensor), before.read(tensor)), tensor
