from __future__ import annotations

import torch

from slimtron_distill.losses import LogitLossSettings, kd_loss, linear_kd_loss


def test_weight_gradient_is_summed_in_fp32() -> None:
    hidden = torch.randn(1000, 1, 256, device="cuda", dtype=torch.bfloat16)
    teacher = torch.randn(1000, 1, 128, device="cuda", dtype=torch.bfloat16)
    head = (torch.randn(5003, 256, device="cuda") / 16).bfloat16()
    teacher_head = (torch.randn(5003, 128, device="cuda") / 11).bfloat16()
    bias = torch.randn(5003, device="cuda", dtype=torch.bfloat16)
    settings = LogitLossSettings()
    exact = [x.detach().double().requires_grad_() for x in (hidden, head, bias)]
    loss = kd_loss(
        exact[0] @ exact[1].t() + exact[2], teacher.double() @ teacher_head.double().t(), settings
    )
    loss.backward()
    for chunk_tokens in (128, 1000):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, head, bias)]
        main_grad = torch.zeros(5003, 256, device="cuda")
        for into in (main_grad, None):
            for leaf in leaves:
                leaf.grad = None
            own = linear_kd_loss(
                *(leaves[0], leaves[1], teacher, teacher_head, settings),
                student_bias=leaves[2],
                main_grad=into,
                logit_bytes=chunk_tokens * 4 * 5003,
            )
            own.backward()
            # Logits rounded to bf16 are off by up to 2**-9 of 4, and so are probabilities.
            assert abs(own.item() / loss.item() - 1) < 1e-3
            for leaf, reference in zip(leaves, exact, strict=True):
                gradient = main_grad if leaf is leaves[1] and into is not None else leaf.grad
                error = (gradient.double() - reference.grad).norm() / reference.grad.norm()
                assert float(error) < 1e-2, float(error)
