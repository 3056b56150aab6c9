"""How good a model is, and how close to its original."""

from slimtron_common.evaluation.evaluate import Distance, Evaluation, evaluate

__all__ = ["Distance", "Evaluation", "evaluate"]
