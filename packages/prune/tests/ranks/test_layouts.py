"""One model, scored and pruned in every layout, becomes the same smaller one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.weights import whole_tensors
from slimtron_common.errors import ParallelismError
from slimtron_common.models.megatron import architecture_of, build_model
from slimtron_common.parallel import ParallelConfig, forward_only, initialize_parallel
from slimtron_common.testing import run_ranks, write_tiny_model
from slimtron_prune import PruningConfig, prune_language_model, save_pruned_model
from slimtron_prune.__main__ import main
from slimtron_prune.scoring.collect import collect_scores

WIDTHS = PruningConfig(64, 48, 2, 2, target_num_layers=3)
LAYOUTS = {
    "tp2": ParallelConfig(tensor_parallel_size=2),
    "tp2-sp": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline_parallel_size=2),
    "dp2": ParallelConfig(),
}


def batches(rank: int = 0, size: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 299, (4, 16), generator=generator)
    return list(tokens[rank::size].split(1))


HYBRID_WIDTHS = PruningConfig(64, 48, 2, 2, target_mamba_num_heads=4, target_mamba_head_dim=8)


def pruned(path: Path, layout: ParallelConfig, out: Path) -> dict[str, Any]:
    """Scores, and this stage's tensors and logits after pruning, by width and by a list."""
    checkpoint = open_checkpoint(f"hf:{path}")
    source = checkpoint.architecture
    found: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    with initialize_parallel(layout, device="cpu") as context:
        own = batches(context.dp_rank, context.dp_size)
        for name, config in (
            ("scores", None),
            ("widths", HYBRID_WIDTHS if source.hybrid else WIDTHS),
            # Of two stages of two layers, the first keeps one; a hybrid's stages stay equal.
            ("layers", PruningConfig(drop_layers=[2, 6] if source.hybrid else [2])),
        ):
            model = build_model(source, context, dtype=torch.float32)
            checkpoint.load(model, context)
            if config is None:
                found[name] = collect_scores(model, own, source, context).sums
                continue
            prune_language_model(model, config, own)
            target = architecture_of(model)
            tensors = {n: t.clone() for n, t in whole_tensors(model, target, context)}
            logits: list[torch.Tensor] = []
            forward_only(
                model, batches()[:1], context, lambda _, x, found=logits: found.append(x.clone())
            )
            if logits and context.tp_size > 1:
                shards = [torch.empty_like(logits[0]) for _ in range(context.tp_size)]
                dist.all_gather(shards, logits[0].contiguous(), group=context.tp_group)
                logits = [torch.cat(shards, -1)]
            found[name] = {"tensors": tensors, "logits": logits}
            # Stages of unequal length, too, are saved as the layers of one model.
            save_pruned_model(model, out / name, model_dir=path)
        if context.pp_size > 1:
            model = build_model(source, context, dtype=torch.float32)
            dropped = [2] if source.hybrid else [1, 2]
            message = "equally many layers" if source.hybrid else "no layer left"
            with pytest.raises(ParallelismError, match=message):
                prune_language_model(model, PruningConfig(drop_layers=dropped))
    return found


def on_rank(
    rank: int, world_size: int, paths: list[Path], layouts: dict[str, ParallelConfig], folder: Path
) -> list[dict[str, Any]]:
    return [
        {name: pruned(path, layout, folder / name / path.name) for name, layout in layouts.items()}
        for path in paths
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", tie_word_embeddings=True)


def test_every_layout_makes_the_same_model(tiny: Path, tmp_path: Path) -> None:
    paths = [tiny]
    if hasattr(transformers, "NemotronHConfig"):
        hybrid = tmp_path / "models" / "hybrid"
        paths.append(write_tiny_model(hybrid, "nemotron_h", tokenizer=False))
    results = run_ranks(on_rank, 2, paths, LAYOUTS, tmp_path)
    for number, path in enumerate(paths):
        expected = pruned(path, ParallelConfig(), tmp_path / "alone" / path.name)
        check_layouts(expected, [result[number] for result in results], tmp_path, path.name)


def check_layouts(
    expected: dict[str, Any], results: list[dict[str, Any]], folder: Path, model: str
) -> None:
    for layout in LAYOUTS:
        seen: dict[str, dict[str, torch.Tensor]] = {"widths": {}, "layers": {}}
        for rank in (result[layout] for result in results):
            for name, value in expected["scores"].items():
                torch.testing.assert_close(rank["scores"][name], value, rtol=1e-4, atol=1e-5)
            for name, tensors in seen.items():
                tensors.update(rank[name]["tensors"])
                for logits in rank[name]["logits"]:
                    torch.testing.assert_close(
                        logits, expected[name]["logits"][0], rtol=1e-4, atol=1e-4
                    )
        for name, tensors in seen.items():
            assert tensors.keys() == expected[name]["tensors"].keys()
            for key, value in expected[name]["tensors"].items():
                torch.testing.assert_close(tensors[key], value, rtol=1e-4, atol=1e-6)
            saved = {"alone", layout}
            depths = {
                open_checkpoint(f"megatron:{folder / s / model / name}").architecture.num_layers
                for s in saved
            }
            assert len(depths) == 1


def run_command(rank: int, world_size: int, arguments: list[list[str]]) -> list[int]:
    return [main(command) for command in arguments]


def test_the_job_in_every_layout(tiny: Path, tmp_path: Path) -> None:
    """Three layers on two stages; the files hardly depend on the layout."""
    common = [
        *("run", "--model", f"hf:{tiny}", "--data", "pydoc", "--device", "cpu"),
        *("--score-tokens", "128", "--score-seq-len", "32", "--eval-tokens", "128"),
        *("--eval-seq-len", "32", "--num-layers", "3", "--hidden-size", "48", "-q"),
    ]
    layouts = {"tp": ["--tp", "2"], "pp": ["--pp", "2"], "dp": []}
    megatron = ["--export-format", "megatron"]
    commands = [[*common, "--out", str(tmp_path / n), *more] for n, more in layouts.items()]
    commands.append([*common, "--out", str(tmp_path / "dist"), "--pp", "2", *megatron])
    assert main([*common, "--out", str(tmp_path / "one")]) == 0
    assert run_ranks(run_command, 2, commands) == [[0] * 4] * 2
    again = [*common, "--out", str(tmp_path / "again"), "--drop-layers", "1"]
    again = [a for a in again if a not in ("--num-layers", "3", "--hidden-size", "48")]
    again[again.index("--model") + 1] = f"megatron:{tmp_path / 'dist'}"
    assert main(again) == 0
    from slimtron_common.checkpoint.huggingface import SafetensorsDirectory

    one = SafetensorsDirectory(tmp_path / "one")
    for name in layouts:
        other = SafetensorsDirectory(tmp_path / name)
        assert other.names == one.names
        for tensor in one.names:
            torch.testing.assert_close(other.read(tensor), one.read(tensor), rtol=1e-5, atol=0)
    # The distributed checkpoint, opened again and pruned further.
    shallower = SafetensorsDirectory(tmp_path / "again")
    layer = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(
        shallower.read(layer), one.read(layer.replace("0", "1")), rtol=1e-5, atol=0
    )


def test_experts_that_are_shared_out_are_scored_and_pruned_alike(tmp_path: Path) -> None:
    from slimtron_common.checkpoint.huggingface import SafetensorsDirectory
    from slimtron_prune.scoring.scores import load_scores

    model = write_tiny_model(tmp_path / "model", "qwen2_moe")
    text = [
        *("--model", f"hf:{model}", "--data", "pydoc", "--device", "cpu", "-q"),
        *("--score-tokens", "192", "--score-seq-len", "32", "--score-batch-size", "1"),
    ]
    sizes = [
        *("--num-moe-experts", "2", "--moe-ffn-hidden-size", "24", "--hidden-size", "48"),
        *("--moe-shared-expert-intermediate-size", "32", "--eval-tokens", "128"),
        *("--eval-seq-len", "32"),
    ]
    jobs = {"score": ["score", *text], "run": ["run", *text, *sizes]}

    def to(name: str) -> list[list[str]]:
        return [[*job, "--out", str(tmp_path / f"{kind}-{name}")] for kind, job in jobs.items()]

    assert [main(command) for command in to("alone")] == [0, 0]
    shared_out = [[*command, "--ep", "2"] for command in to("shared")]
    assert run_ranks(run_command, 2, shared_out) == [[0, 0]] * 2
    architecture = open_checkpoint(f"hf:{model}").architecture
    alone, shared = (
        load_scores(tmp_path / f"score-{name}", architecture).sums for name in ("alone", "shared")
    )
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-5, msg=name)
    one, other = (SafetensorsDirectory(tmp_path / f"run-{name}") for name in ("alone", "shared"))
    assert other.names == one.names
    for tensor in one.names:
        torch.testing.assert_close(other.read(tensor), one.read(tensor), rtol=1e-5, atol=0)
