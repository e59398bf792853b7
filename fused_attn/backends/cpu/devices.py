"""What the tiles may do with CPU tensors alone: look at values for nothing, and let an operation write where it reads."""

from __future__ import annotations

import torch
from torch import Tensor


def at_hand(tensor: Tensor) -> bool:
    """Whether looking at a value is free; on other devices it waits for everything that was launched before."""
    return tensor.device.type == "cpu"


def softmax_(scores: Tensor) -> None:
    """The softmax of the rows of [..., keys] in place. torch promises nothing of an ``out=`` that is the input; its CPU kernel is known."""
    if at_hand(scores):
        torch.softmax(scores, -1, out=scores)
    else:
        scores.copy_(torch.softmax(scores, -1))


def softmax_backward_(dprobs: Tensor, probs: Tensor) -> Tensor:
    """probs * (dprobs - sum(probs * dprobs)) of the rows of [..., keys], in the memory of ``dprobs``."""
    if at_hand(dprobs):
        return torch._softmax_backward_data(dprobs, probs, -1, probs.dtype, grad_input=dprobs)
    return dprobs.copy_(torch._softmax_backward_data(dprobs, probs, -1, probs.dtype))


def some(where: Tensor) -> bool:
    """Whether there is work where a bool tensor is True: always, on devices that would have to be waited for."""
    return not at_hand(where) or bool(where.any())
