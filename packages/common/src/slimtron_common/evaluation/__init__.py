"""How good a model is, and how close to its original."""

from slimtron_common.evaluation.evaluate import evaluate

__all__ = ["evaluate"]
