"""Makes the checkpoints beside it, with NeMo 2.7.3 and megatron-core 0.15.3 (the line nemo).

    python make.py HF_DIR OUT                                            # and OUT.logits.pt
    torchrun --nproc-per-node 2 make.py HF_DIR OUT TENSOR_SIZE PIPELINE_SIZE

HF_DIR is a tiny Llama that ``write_tiny_model`` wrote with hidden_size=32, intermediate_size=48,
head_dim=8 and num_hidden_layers=2.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F

from slimtron_common.backend.cpu import cpu_backend
from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.weights import load_weights
from slimtron_common.parallel import ParallelContext, unwrap_model

PADDED_TO = 128


def main(source: str, out: Path, tensor_size: int = 1, pipeline_size: int = 1) -> None:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.gpt.model.base import local_layer_spec
    from nemo.lightning import io

    class Connector(io.ModelConnector):
        """Sets a model up and saves it as NeMo's own converters do."""

        def init(self) -> None: ...
        def apply(self, output_path: Path) -> None: ...

    checkpoint = open_checkpoint(f"hf:{source}")
    a = checkpoint.architecture
    config = llm.LlamaConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_query_groups=a.num_query_groups,
        kv_channels=a.head_dim,
        seq_length=a.max_position_embeddings,
        layernorm_epsilon=a.norm_epsilon,
        rotary_base=a.rotary_base,
        make_vocab_size_divisible_by=PADDED_TO,
        # What needs Transformer Engine or a GPU.
        transformer_layer_spec=local_layer_spec,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    model = llm.LlamaModel(config, tokenizer=AutoTokenizer(source))
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=pipeline_size,
        process_group_backend="gloo",
        ckpt_save_optimizer=False,
        always_save_context=True,
        pipeline_dtype=torch.float32,
    )
    trainer = nl.Trainer(
        devices=tensor_size * pipeline_size,
        accelerator="cpu",
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
    )
    connector = Connector(out)
    trainer = connector.nemo_setup(model, trainer)
    megatron = unwrap_model(model)
    rows = -(-a.vocab_size // (PADDED_TO * tensor_size)) * PADDED_TO * tensor_size

    def read(name: str) -> torch.Tensor:
        tensor = checkpoint.tensors.read(name)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = F.pad(tensor, (0, 0, 0, rows - tensor.shape[0]))
        return tensor

    context = ParallelContext.from_megatron(device=torch.device("cpu"))
    load_weights(megatron, dataclasses.replace(a, vocab_size=rows), context, read)
    connector.nemo_save(out, trainer)
    if tensor_size * pipeline_size == 1:
        model_parallel_cuda_manual_seed(0)
        tokens = torch.randint(a.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))
        mask = torch.ones(24, 24, dtype=torch.bool).triu(1)[None, None]
        with torch.no_grad():
            logits = megatron.eval()(tokens, torch.arange(24).expand(2, 24), mask)
        torch.save({"tokens": tokens, "logits": logits[..., : a.vocab_size].clone()},
                   out.with_suffix(".logits.pt"))  # fmt: skip


if __name__ == "__main__":
    numpy.product = numpy.prod  # Megatron-Core 0.15.3 was written for NumPy 1.
    with cpu_backend():
        main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
