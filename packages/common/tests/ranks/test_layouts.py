"""One model, cut in every way, computes what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelConfig, forward_only, initialize_parallel
from slimtron_common.testing import run_ranks, write_tiny_model

LAYOUTS = [
    ParallelConfig(tensor_parallel_size=2),
    ParallelConfig(pipeline_parallel_size=2),
    # Two layers, one and one.
    ParallelConfig(pipeline_parallel_size=3),
    ParallelConfig(tensor_parallel_size=2, sequence_parallel=True),
    ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2),
    ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2, sequence_parallel=True),
]


def _name(layout: ParallelConfig) -> str:
    sp = "-sp" if layout.sequence_parallel else ""
    return f"tp{layout.tensor_parallel_size}-pp{layout.pipeline_parallel_size}{sp}"


def _tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Two full batches and a shorter one.
    sizes = [(2, 16), (2, 16), (1, 16)]
    return [torch.randint(0, 299, size, generator=generator) for size in sizes]


def _on_rank(
    rank: int, world_size: int, paths: list[Path], layout: ParallelConfig
) -> list[dict[str, object]]:
    # Starting a process costs more than running these models: both in one.
    return [_forward_and_backward(path, layout) for path in paths]


def _forward_and_backward(path: Path, layout: ParallelConfig) -> dict[str, object]:
    """Logits of all batches, and the gradients of the whole model for the first one."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    checkpoint = open_checkpoint(f"hf:{path}")
    with initialize_parallel(layout, device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)

        logits: dict[int, torch.Tensor] = {}
        forward_only(model, _tokens(), context, lambda i, x: logits.update({i: x.clone()}))
        whole = {}
        for index, shard in logits.items():
            shards = [torch.empty_like(shard) for _ in range(context.tp_size)]
            dist.all_gather(shards, shard, group=context.tp_group)
            whole[index] = torch.cat(shards, -1)[..., : checkpoint.architecture.vocab_size]

        model.requires_grad_(True)
        tokens = _tokens()[0]

        def step(iterator, model):
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            labels = tokens.roll(-1, 1)
            output = model(next(iterator), positions, None, labels=labels)
            return output, lambda losses: (losses.mean(), {})

        model.config.finalize_model_grads_func = None
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([tokens]),
            model=model,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=False,
        )
        has_embedding = context.is_first_stage or context.is_last_stage
        if context.pp_size > 1 and has_embedding and checkpoint.architecture.tied_embeddings:
            group = parallel_state.get_embedding_group()
            weight = model.shared_embedding_or_output_weight()
            dist.all_reduce(weight.grad, group=group)
        if layout.sequence_parallel:
            for parameter in model.parameters():
                if getattr(parameter, "sequence_parallel", False):
                    dist.all_reduce(parameter.grad, group=context.tp_group)
        return {"logits": whole, "gradients": _whole_gradients(model, checkpoint, context)}


def _whole_gradients(model, checkpoint, context):
    from slimtron_common.checkpoint.weights import bound_parameters, gather_shards

    found = {}
    for bound in bound_parameters(model, checkpoint.architecture):
        shards = gather_shards(bound.tensor.grad, context)
        found.update(zip(bound.rule.hf_names, bound.rule.layout.split(shards), strict=True))
    return found


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """For a tied and an untied model: its directory, transformers' logits and gradients."""
    return [
        _reference(tmp_path_factory.mktemp("model") / "tiny", tied=tied) for tied in (True, False)
    ]


def _reference(path: Path, *, tied: bool):
    write_tiny_model(path, tie_word_embeddings=tied, tokenizer=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).float()
    with torch.no_grad():
        logits = [model(tokens).logits for tokens in _tokens()]
    tokens = _tokens()[0]
    loss = torch.nn.functional.cross_entropy(
        model(tokens).logits.flatten(0, 1), tokens.roll(-1, 1).flatten()
    )
    loss.backward()
    return path, logits, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=_name)
def test_logits_and_gradients_are_those_of_transformers(references, layout):
    paths = [path for path, _, _ in references]
    results = run_ranks(_on_rank, layout.model_parallel_size, paths, layout)
    for number, (_, logits, gradients) in enumerate(references):
        seen = set()
        for result in (rank[number] for rank in results):
            for index, found in result["logits"].items():
                torch.testing.assert_close(found, logits[index], rtol=1e-4, atol=1e-4)
                assert torch.equal(found.argmax(-1), logits[index].argmax(-1))
                seen.add(index)
            for name, found in result["gradients"].items():
                torch.testing.assert_close(
                    found, gradients[name], rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
                )
                seen.add(name)
        # The stages together cover every batch and every parameter.
        assert seen >= {0, 1, 2} | set(gradients)
