"""SGD in three launches for any depth, and bf16 copies of the convolutions' weights, the shadows.

Autocast casts every weight to bf16 in every step, and every weight's gradient back to fp32: 17 of ResNet-20's 212
kernels a step, even where Inductor joins them. Here the network is run on bf16 leaves that the update writes along with
their fp32 masters, which keep the names, the optimizer's state and the checkpoint. The numbers are autocast's: the same
casts, at another time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ShadowedSgd:
    """The update of `optim.make_sgd`'s optimizer, done on weights and velocities that lie in one piece each.

    Args:
        net: Its parameters become views of two fp32 tensors, with values, shapes and strides as they were.
        optimizer: From `optim.make_sgd`, with momentum; its velocities become views likewise. Its `step` is not called.
        compiled: Compile the update: one kernel, beside the two that gather the gradients.

    Attributes:
        leaves: The bf16 convolution weights by parameter name, which stand in the graph instead of their masters.
        shadows: The same in one piece: what an update changes beyond the network's and the optimizer's own tensors.
    """

    def __init__(self, net: nn.Module, optimizer: torch.optim.SGD, *, compiled: bool) -> None:
        masters = {name: p for name, p in net.named_parameters() if p.ndim == 4}
        self._others = [p for name, p in net.named_parameters() if name not in masters]
        self._pieces = [_Piece(list(masters.values()), optimizer), _Piece(self._others, optimizer)]
        self.shadows, views = _one_piece([p.detach().bfloat16() for p in masters.values()])
        self.leaves = {name: view.requires_grad_() for name, view in zip(masters, views, strict=True)}
        self._momentum: float = optimizer.param_groups[0]["momentum"]
        self._update: Callable[..., None] = _update
        if compiled:
            options: dict[str, Any] = {"combo_kernels": True}
            self._update = torch.compile(_update, fullgraph=True, dynamic=False, options=options)

    def refresh(self) -> None:
        """Cast the masters anew, after something else changed them."""
        self.shadows.copy_(self._pieces[0].weights)

    @torch.no_grad()
    def step(self, lrs: Tensor, counter: Tensor, done: tuple[Tensor, Tensor] | None = None) -> None:
        """Update with the learning rate that stands at `counter`, and leave no gradients behind.

        Args:
            lrs: float32 `(steps,)`.
            counter: int64 `(1,)`.
            done: Flat gradients: of the convolutions' weights, and of the leading (or all) other parameters.
        """
        leaves: tuple[list[Tensor], ...] = (list(self.leaves.values()), list(self._others))
        if done:
            late = [_gradient(leaf).flatten() for leaf in leaves[1] if leaf.grad is not None]
            grads = [(done[0],), (done[1], *late)]
        else:
            grads = [(_flat([_gradient(leaf) for leaf in group]),) for group in leaves]
        pieces = [(p.weights, p.velocities, g, p.decay) for p, g in zip(self._pieces, grads, strict=True)]
        self._update(*pieces, self.shadows, lrs, counter, self._momentum)
        for leaf in (*leaves[0], *leaves[1]):
            leaf.grad = None


class _Piece:
    """Parameters of one kind, their velocities and their weight decay, each in one tensor."""

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.SGD) -> None:
        decay = {id(p): float(group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
        self.decay = torch.cat([torch.full_like(p.detach(), decay[id(p)]).flatten() for p in parameters])
        self.weights, views = _one_piece([p.detach() for p in parameters])
        for parameter, view in zip(parameters, views, strict=True):
            parameter.data = view
        states = [optimizer.state[p] for p in parameters]  # without momentum they hold nothing
        held = [s.get("momentum_buffer", p.detach()) for s, p in zip(states, parameters, strict=True)]
        self.velocities, views = _one_piece(held)
        for state, view in zip(states, views, strict=True):
            if "momentum_buffer" in state:
                state["momentum_buffer"] = view


def _update(
    masters: tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor],
    others: tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor],
    shadows: Tensor,
    lrs: Tensor,
    counter: Tensor,
    momentum: float,
) -> None:
    """The formula of `optim.make_sgd`, with the roundings of torch's own on a CPU."""
    lr = lrs.index_select(0, counter)
    for weights, velocities, grads, decay in (masters, others):
        whole = torch.cat(grads) if len(grads) > 1 else grads[0]  # compiled, this is no kernel of its own
        velocities.mul_(momentum).add_(torch.addcmul(whole.float(), decay, weights))
        weights.addcmul_(velocities, -lr)
    shadows.copy_(masters[0])


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad  # with the strides of its leaf, which autograd sees to


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Their numbers one after the other, in the order in which they lie in memory."""
    return torch.cat([t.as_strided((t.numel(),), (1,)) for t in tensors])


def _one_piece(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One tensor with the numbers of many dense ones, and views of it as they were."""
    flat, views, offset = _flat(tensors), [], 0
    for t in tensors:
        views.append(flat.as_strided(t.shape, t.stride(), offset))
        offset += t.numel()
    return flat, views
