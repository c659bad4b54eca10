"""Counts the calls that compute gradients of deltas."""

from torch.utils._python_dispatch import TorchDispatchMode

from rbfast import ops


class GradientCalls(TorchDispatchMode):
    """`together`: how many matrices each call of column_grad_all takes. `alone`: the number of calls of column_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.together: list[int] = []
        self.alone = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is ops.column_grad_all:
            self.together.append(len(args[0]))
        self.alone += func is ops.column_grad
        return func(*args, **(kwargs or {}))
