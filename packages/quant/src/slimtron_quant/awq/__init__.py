"""Activation-aware weight quantization: scale up the input channels that matter most.

AWQ, Lin et al. 2023, https://arxiv.org/abs/2306.00978, in the variant that ModelOpt calls
``awq_lite``, from one pass over the calibration text and equal in every parallel layout.
"""

from slimtron_quant.awq.apply import awq_calibrate
from slimtron_quant.awq.result import AWQResult, LayerScale

__all__ = ["AWQResult", "LayerScale", "awq_calibrate"]
