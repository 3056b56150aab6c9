"""What calibration costs: Slimtron's and ModelOpt's, against a plain forward pass.

    python benchmarks/calibration.py [--layers 4] [--hidden 4096] [--tokens 65536]

Random tokens run through a model with random weights and the shape of Llama 8B. The time is that
from the first token to finished scales, without building the model and inserting quantizers; that
of the checks after it is Slimtron's alone. For AWQ the output error of every linear layer is
measured on the original model's inputs, all of the text, and set against ModelOpt's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from slimtron_common.integrations.modelopt import QuantConfig, to_modelopt
from slimtron_common.manifest import environment_versions
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, initialize_parallel
from slimtron_quant.calibration.maxima import collecting_maxima
from slimtron_quant.config import QuantizationConfig
from slimtron_quant.quantizer import Quantizer, calibration_loop
from slimtron_quant.recipes.scheme import quantization_scheme
from slimtron_quant.summary import linear_modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default="fp8,int8,int8_sq,int4_awq")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--layer-spec", default="auto")
    args = parser.parse_args()
    with initialize_parallel() as context:
        bench = Bench(args, context)
        table = Table(title=bench.title)
        for header in (
            *("recipe", "Slimtron", "of it text", "scales", "checks", "ModelOpt"),
            "worst layer's error / ModelOpt's",
        ):
            table.add_column(header, justify="right")
        for recipe in args.recipes.split(","):
            table.add_row(recipe, *bench.compare(recipe))
    Console(width=120).print(table)
    print(", ".join(f"{name} {version}" for name, version in environment_versions().items()))


class Bench:
    def __init__(self, args: argparse.Namespace, context: ParallelContext) -> None:
        self.args, self.context = args, context
        self.architecture = Architecture(
            family="llama",
            num_layers=args.layers,
            hidden_size=args.hidden,
            ffn_hidden_size=args.hidden * 7 // 2,
            num_attention_heads=args.hidden // 128,
            num_query_groups=args.hidden // 512,
            head_dim=128,
            vocab_size=32000,
            max_position_embeddings=args.seq_length,
            norm_epsilon=1e-5,
            rotary_base=500000.0,
        )
        generator = torch.Generator().manual_seed(0)
        batches = args.tokens // args.seq_length // args.micro_batch_size
        shape = (batches, args.micro_batch_size, args.seq_length)
        self.batches = list(torch.randint(32000, shape, generator=generator).to(context.device))
        self.loop = calibration_loop(self.batches, context)
        self.original = self.model()
        self.loop(self.original)
        self.forward = min(self.timed(lambda: self.loop(self.original)) for _ in range(3))
        device = context.device.type
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        self.title = (
            f"{args.layers} layers of hidden size {args.hidden}, {args.tokens} tokens, one forward "
            f"pass {self.forward:.3f} s, {name}, {date.today()}"
        )

    def model(self) -> Any:
        on_gpu = self.context.device.type == "cuda"
        model = build_model(
            self.architecture,
            self.context,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            layer_spec=self.args.layer_spec,
        )
        generator = torch.Generator(self.context.device).manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Channels of very different size, as trained models have.
                parameter.normal_(generator=generator).exp_()
            else:
                parameter.normal_(std=0.02, generator=generator)
        return model

    def compare(self, recipe: str) -> tuple[str, ...]:
        settings = QuantizationConfig(algorithm=recipe, awq_block_size="auto")
        scheme = quantization_scheme(settings, self.architecture)
        config = scheme.modelopt_config()
        self.warm_up(config)
        quantizer, ours = Quantizer(settings), self.model()
        text = 0.0

        def loop(model: Any) -> None:
            nonlocal text
            text += self.timed(lambda: self.loop(model))

        algorithm = quantizer._attach(ours, scheme)
        total = self.timed(lambda: quantizer._calibrate(ours, algorithm, loop))
        checks = self.timed(lambda: quantizer._finish(ours, self.context, scheme))
        upstream = self.model()
        mtq.quantize(upstream, to_modelopt(config.with_algorithm(None)))
        peer = self.timed(lambda: mtq.calibrate(upstream, config.algorithm, self.loop))
        worst = self.worst_ratio(ours, upstream) if "awq" in recipe else ""
        return (
            self.shown(total),
            *(f"{seconds:.2f} s" for seconds in (text, total - text, checks)),
            self.shown(peer),
            worst,
        )

    def warm_up(self, config: QuantConfig) -> None:
        """Has ModelOpt build its kernels, which takes a minute once on a machine."""
        layer = nn.Sequential(nn.Linear(128, 128)).to(self.context.device)
        x = torch.randn(8, 128, device=self.context.device)
        mtq.quantize(layer, to_modelopt(config), collecting_maxima(lambda layer: layer(x)))
        layer(x)

    def worst_ratio(self, ours: nn.Module, upstream: nn.Module) -> str:
        """Compares the output errors of the layers on the original model's inputs."""
        errors: dict[str, list[float]] = {}
        hooks = []
        sides = [linear_modules(ours), linear_modules(upstream)]
        for name, module in linear_modules(self.original).items():
            errors[name] = [0.0, 0.0]

            def add(module: Any, arguments: tuple[Tensor, ...], name: str = name) -> None:
                for side, linears in enumerate(sides):
                    errors[name][side] += error(linears[name], module.weight, arguments[0])

            hooks.append(module.register_forward_pre_hook(add))
        self.loop(self.original)
        for hook in hooks:
            hook.remove()
        ratios = {name: mine / theirs for name, (mine, theirs) in errors.items()}
        name = max(ratios, key=ratios.__getitem__)
        return f"{ratios[name]:.5f} ({name}); mean {sum(ratios.values()) / len(ratios):.5f}"

    def timed(self, work: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.context.device.type == "cuda":
            torch.cuda.synchronize()

    def shown(self, seconds: float) -> str:
        return f"{seconds:.2f} s = {seconds / self.forward:.2f}x"


@torch.no_grad()
def error(module: Any, original: Tensor, x: Tensor) -> float:
    """Squared output error of a quantized layer."""
    factor = module.input_quantizer.pre_quant_scale
    scaled = x if factor is None else x * factor
    weight = module.weight_quantizer(module.weight)
    wrong = F.linear(scaled.float(), weight.float()) - F.linear(x.float(), original.float())
    return float(wrong.double().square().sum())


if __name__ == "__main__":
    main()
