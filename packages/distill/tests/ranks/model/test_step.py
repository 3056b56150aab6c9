"""One optimizer step in every layout against plain torch on transformers' own models."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.weights import whole_tensors
from slimtron_common.models.megatron import build_chunks
from slimtron_common.parallel import ParallelConfig, ParallelContext, initialize_parallel
from slimtron_common.testing import run_ranks, write_tiny_model
from slimtron_distill.config import DistillationConfig
from slimtron_distill.hidden.match import make_projection
from slimtron_distill.model.task import DistillationTask, distillation_task
from slimtron_distill.training.config import GuardConfig, OptimizerConfig, TrainingConfig
from slimtron_distill.training.trainer import Trainer

# Odd, so that tensor parallelism pads it.
VOCAB = 301
PAIRS = (
    ("decoder.layers.1", "decoder.layers.3"),
    ("decoder.layers.2", "decoder.layers.4"),
)
STEPS, LR, EPS, CLIP = 2, 1e-2, 1e-3, 0.5


@dataclass(frozen=True)
class Case:
    parallel: dict[str, Any] = field(default_factory=dict)
    vpp: int = 1
    models: str = "dense"
    teacher_sp: bool | None = None
    """Whether the teacher's sequences are cut; None for as the student's."""
    config: dict[str, Any] = field(default_factory=dict)
    logit_bytes: int | None = None
    """Memory for logits, where output layers are left to the loss."""


WITH_ALL = {
    "intermediate_layer_pairs": PAIRS,
    "skip_lm_loss": False,
    "kd_loss_scale": 2.0,
    "intermediate_loss_scale": 0.5,
    "loss_balancer": "dynamic",
}
LOGITS_ALONE: dict[str, Any] = {}
MSE = {"intermediate_layer_pairs": PAIRS, "intermediate_criterion": "mse"}


def _tp(size: int, **more: Any) -> dict[str, Any]:
    return {"tensor_parallel_size": size, **more}


CASES = {
    1: {
        "alone": Case(config=WITH_ALL),
        "alone, logits": Case(),
        "alone, mse": Case(config=MSE),
        "alone, linear": Case(config=MSE, logit_bytes=1),
    },
    2: {
        "tp2": Case(_tp(2), config=WITH_ALL),
        "tp2 sp": Case(_tp(2, sequence_parallel=True), config=WITH_ALL),
        "pp2": Case({"pipeline_parallel_size": 2}, config=WITH_ALL),
        "pp2, logits": Case({"pipeline_parallel_size": 2}),
        "pp2, linear": Case({"pipeline_parallel_size": 2}, logit_bytes=1),
        "tp2 sp, linear": Case(_tp(2, sequence_parallel=True), logit_bytes=1),
        "ep2, linear": Case({"expert_parallel_size": 2}, models="experts", logit_bytes=1),
        "pp2 vpp2": Case({"pipeline_parallel_size": 2}, vpp=2, config=WITH_ALL),
        "dp2": Case(config=WITH_ALL),
        "cp2": Case({"context_parallel_size": 2}, config=WITH_ALL),
        "ep2": Case({"expert_parallel_size": 2}, models="experts", config=WITH_ALL),
    },
    4: {
        "tp2 pp2 sp": Case(
            _tp(2, pipeline_parallel_size=2, sequence_parallel=True), config=WITH_ALL
        ),
        "tp2 pp2 vpp2 sp": Case(
            _tp(2, pipeline_parallel_size=2, sequence_parallel=True), vpp=2, config=MSE
        ),
        "tp2 pp2, teacher sp": Case(
            _tp(2, pipeline_parallel_size=2), teacher_sp=True, config=WITH_ALL
        ),
        "tp2 pp2 vpp2 sp, teacher not": Case(
            _tp(2, pipeline_parallel_size=2, sequence_parallel=True),
            vpp=2,
            teacher_sp=False,
            config=WITH_ALL,
        ),
        "tp2 dp2": Case(_tp(2), config=WITH_ALL),
        "tp2 pp2 vpp2 sp, linear": Case(
            _tp(2, pipeline_parallel_size=2, sequence_parallel=True), vpp=2, logit_bytes=1
        ),
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students and teachers that differ in depth, width and heads."""
    folder = tmp_path_factory.mktemp("models")
    common: dict[str, Any] = {"tokenizer": False, "vocab_size": VOCAB}
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    large = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    large |= {"head_dim": 8}
    tied = {"tie_word_embeddings": True}
    write_tiny_model(folder / "dense-student", seed=1, **common, **small, **tied)
    write_tiny_model(folder / "dense-teacher", seed=2, **common, **large)
    write_tiny_model(folder / "experts-student", "mixtral", seed=3, **common, **small)
    write_tiny_model(folder / "experts-teacher", "mixtral", seed=4, **common, **large)
    return folder


def _batches() -> list[dict[str, Tensor]]:
    """Micro-batches of one sequence whose tokens count unevenly, one of them not at all."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (4, 17), generator=generator)
    mask = (torch.rand(4, 16, generator=generator) < 0.7).float()
    mask[1], mask[2, 3:] = 0, 0
    labels = torch.where(mask != 0, tokens[:, 1:], -100)
    return [
        {
            "tokens": tokens[i : i + 1, :-1],
            "labels": labels[i : i + 1],
            "loss_mask": mask[i : i + 1],
        }
        for i in range(4)
    ]


def _on_rank(_: int, world_size: int, folder: Path) -> dict[str, Any]:
    return {name: _train(case, folder) for name, case in CASES[world_size].items()}


def _train(case: Case, folder: Path) -> dict[str, Any]:
    with initialize_parallel(
        ParallelConfig(**case.parallel), device="cpu", virtual_pipeline_size=case.vpp
    ) as context:
        chunks = []
        for name in ("student", "teacher"):
            checkpoint = open_checkpoint(f"hf:{folder}/{case.models}-{name}")
            chunks.append(_build(name, checkpoint.architecture, case, context))
            for chunk in chunks[-1]:
                checkpoint.load(chunk, context)
            if name == "student":
                architecture = checkpoint.architecture
        task = distillation_task(
            *chunks,
            DistillationConfig(**case.config),
            context,
            vocab_size=VOCAB,
            logit_bytes=case.logit_bytes,
        )
        if case.logit_bytes:
            # An output layer that is called would make the logits.
            for chunk in task.chunks:
                for model in (chunk.module, chunk.teacher):
                    if model.post_process:
                        model.output_layer.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
        teacher = [p.clone() for chunk in task.chunks for p in chunk.teacher.parameters()]
        trainer = Trainer(
            task,
            context,
            training=TrainingConfig(
                steps=10, seq_length=16, micro_batch_size=1, global_batch_size=4
            ),
            optimizer=OptimizerConfig(
                lr=LR, min_lr=LR, decay="constant", weight_decay=0.0, eps=EPS, clip_grad=CLIP
            ),
            guard=GuardConfig(),
            seed=1,
        )
        results = [
            trainer.train_step(_batches()[context.dp_rank :: context.dp_size]) for _ in range(STEPS)
        ]
        _check_teacher(task, teacher)
        weights = {
            name: tensor.detach().clone()
            for chunk in task.student_chunks
            for name, tensor in whole_tensors(chunk, architecture, context)
        }
        return {
            "weights": weights,
            "projections": {k: v.detach().clone() for k, v in task.extra_parameters().items()},
            "losses": [result.losses for result in results],
            "grad_norm": [result.grad_norm for result in results],
        }


def _build(name: str, architecture: Any, case: Case, context: ParallelContext) -> Any:
    if name == "teacher" and case.teacher_sp is not None:
        context = replace(context, sequence_parallel=case.teacher_sp)
    return build_chunks(architecture, context, dtype=torch.float32)


def _check_teacher(task: DistillationTask, before: list[Tensor]) -> None:
    after = [p for chunk in task.chunks for p in chunk.teacher.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in after)
    assert not any(m.training for chunk in task.chunks for m in chunk.teacher.modules())


def _reference(case: Case, folder: Path) -> dict[str, Any]:
    """The same in plain torch: whole models, the whole batch at once, no Megatron."""
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / f"{case.models}-{name}")
        for name in ("student", "teacher")
    )
    config = DistillationConfig(**case.config)
    cpu = torch.device("cpu")
    widths = student.config.hidden_size, teacher.config.hidden_size
    projections = [make_projection(p, widths, torch.float32, cpu) for p in PAIRS]
    if not config.intermediate_layer_pairs:
        projections = []
    parameters = [*student.parameters(), *(p.weight for p in projections)]
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=(0.9, 0.95), eps=EPS)
    micro = _batches()
    batch = {name: torch.cat([part[name] for part in micro]) for name in micro[0]}
    kept = batch["loss_mask"].bool()
    kd_factor = hidden_factor = 1.0
    all_losses, norms = [], []
    for _ in range(STEPS):
        ours = student(batch["tokens"], output_hidden_states=True)
        with torch.no_grad():
            theirs = teacher(batch["tokens"], output_hidden_states=True)
        log_p, log_q = (x.logits[kept].log_softmax(-1) for x in (theirs, ours))
        kd = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        lm = F.cross_entropy(ours.logits[kept], batch["labels"][kept])
        hidden = []
        for pair, projection in zip(config.intermediate_layer_pairs, projections, strict=True):
            i, j = (int(name.rpartition(".")[2]) + 1 for name in pair)
            a, b = projection(ours.hidden_states[i][kept]), theirs.hidden_states[j][kept]
            hidden.append(
                F.mse_loss(a, b)
                if config.intermediate_criterion == "mse"
                else 1 - F.cosine_similarity(a, b, dim=-1).mean()
            )
        intermediate = sum(hidden) / len(hidden) if hidden else torch.tensor(0.0)
        kd_total = kd + config.intermediate_loss_scale * hidden_factor * intermediate
        total = kd_total
        if not config.skip_lm_loss:
            total = lm + config.kd_loss_scale * kd_factor * kd_total
        optimizer.zero_grad()
        total.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
        optimizer.step()
        losses = {"loss": total.item(), "logits_loss": kd.item()}
        if not config.skip_lm_loss:
            losses["lm_loss"] = lm.item()
        if hidden:
            losses["intermediate_loss"] = intermediate.item()
            for pair, value in zip(PAIRS, hidden, strict=True):
                losses[f"intermediate_loss/{pair[0]}-{pair[1]}"] = value.item()
        if config.loss_balancer == "dynamic":
            hidden_factor = (kd / intermediate).item()
            kd_factor = (lm / (kd + config.intermediate_loss_scale * kd)).item()
        all_losses.append(losses)
    with tempfile.TemporaryDirectory() as saved:
        # On disk its tensors have the names that every version of transformers reads.
        student.save_pretrained(saved)
        weights = load_file(f"{saved}/model.safetensors")
    names = [f"projection.{a}-{b}" for a, b in config.intermediate_layer_pairs]
    return {
        "weights": weights,
        "projections": dict(zip(names, (p.weight.detach() for p in projections), strict=True)),
        "losses": all_losses,
        "grad_norm": norms,
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parameters_are_those_of_one_process(world_size: int, folder: Path) -> None:
    ranks = run_ranks(_on_rank, world_size, folder)
    for name, case in CASES[world_size].items():
        expected = _reference(case, folder)
        results = [rank[name] for rank in ranks]
        for what in ("weights", "projections"):
            for result in results:
                for key, value in result[what].items():
                    _assert_close(value, expected[what][key], f"{name}, {key}")
            found = {key for result in results for key in result[what]}
            assert found == expected[what].keys(), name
        for result in results:
            for ours, theirs in zip(result["losses"], expected["losses"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4), name
            assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), name


def _assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=2e-6, msg=lambda message: f"{name}: {message}"
    )
