from __future__ import annotations

import math

import pytest

from slimtron_common.report import Column, Comparison, Metric, Plot, Table


@pytest.fixture
def comparison() -> Comparison:
    layers = tuple(range(6))
    return Comparison(
        "SmolLM2-135M, INT4 AWQ",
        (
            Column(
                "original",
                {
                    "weight_bytes": 269030016,
                    "bits_per_weight": 16.0,
                    "perplexity": 14.004123,
                    "kl": None,
                    "agreement": None,
                },
            ),
            Column(
                "quantized (in memory)",
                {
                    "weight_bytes": 112873472,
                    "bits_per_weight": 6.713,
                    "perplexity": 15.7312,
                    "kl": 0.08231,
                    "agreement": 0.88112,
                },
            ),
            Column(
                "exported (reloaded)",
                {
                    "weight_bytes": 112873472,
                    "bits_per_weight": 6.713,
                    "perplexity": math.inf,
                    "kl": math.nan,
                    "agreement": 0.0,
                    "tokens_per_second": 1200,
                },
            ),
        ),
        (
            Plot(
                "Signal to noise",
                "line",
                layers,
                {"qkv": (30, 31.5, None, math.nan, 29.0, 28), "fc2": (27.0,) * 6},
                x_label="layer",
                y_label="dB",
                note="Higher is better.",
            ),
            Plot("Weights by part", "bar", ("attention", "mlp"), {"MiB": (13.4, 40.3)}),
            Plot.histogram("KL per token", {"quantized": [0.01, 0.1, 0.2, 0.0]}, log_x=True),
        ),
        (
            Table(
                "Coverage",
                ("module", "bits", "quantized", "reason"),
                (("layers.0.fc1", 4.5, True, None), ("output_layer", 16, False, "excluded")),
            ),
        ),
        {"recipe": "int4-awq", "torch": "2.13.0"},
        (Metric("tokens_per_second", "Speed", unit="tokens/s", better="higher", format="count"),),
    )
