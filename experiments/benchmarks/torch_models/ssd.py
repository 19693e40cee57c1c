"""State space duality (Mamba-2, Dao & Gu 2024) in plain PyTorch: the recurrence and its chunked form.

Both take the step sizes delta after softplus and compute, for each head,

    state_t = exp(delta_t A) state_{t-1} + delta_t x_t B_t^T          state [p,n]
    y_t     = state_t C_t + D x_t
"""

import torch
from torch.nn import functional as F


def ssd_sequential(x, delta, A, B, C, *, D=None, initial_state=None):
    """Walks the recurrence position by position: the definition.

    Args:
      x: [b,l,h,p] inputs.
      delta: [b,l,h] step sizes, not negative.
      A: [h], negative.
      B, C: [b,l,g,n]; g groups divide the h heads.
      D: [h] or None for no skip.
      initial_state: [b,h,p,n] or None for zeros.

    Returns:
      y [b,l,h,p] and the final state [b,h,p,n].
    """
    b, length, h, p = x.shape
    B, C = (groups.repeat_interleave(h // groups.shape[2], dim=2) for groups in (B, C))
    state = x.new_zeros(b, h, p, B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        decay = torch.exp(delta[:, t] * A)
        state = decay[..., None, None] * state + torch.einsum("bh,bhp,bhn->bhpn", delta[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    y = torch.stack(outputs, dim=1)
    return (y if D is None else y + D[:, None] * x), state


def ssd_chunked(x, delta, A, B, C, *, D=None, initial_state=None, chunk_size=32):
    """Computes the same by dense products inside chunks of `chunk_size` positions and a recurrence over the chunks.

    Arguments and results as in `ssd_sequential`. The length need not be a multiple of the chunk: padded positions have
    delta 0, which neither decays nor feeds the state.
    """
    b, length, h, p = x.shape
    groups, n = B.shape[2:]
    pad = -length % chunk_size
    # axes: b batch, c chunk, i and j positions inside it, g group, r heads of the group, p head width, n state width
    xd, a, B, C = (
        F.pad(array.flatten(2), (0, 0, 0, pad)).unflatten(1, (-1, chunk_size))
        for array in (x * delta[..., None], delta * A, B, C)
    )
    xd = xd.unflatten(-1, (groups, h // groups, p))
    B, C = (array.unflatten(-1, (groups, n)) for array in (B, C))
    total = a.unflatten(-1, (groups, h // groups)).cumsum(2).permute(0, 1, 3, 4, 2)  # [b,c,g,r,i]

    # Masked before exp: above the diagonal the sum is positive and may overflow, and inf * 0 makes NaN gradients.
    future = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf).exp()  # [b,c,g,r,i,j]
    scores = torch.einsum("bcign,bcjgn->bcgij", C, B)
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", scores[:, :, :, None] * decay, xd)

    to_end = (total[..., -1:] - total).exp()
    contributions = torch.einsum("bcjgn,bcjgrp->bcgrpn", B, xd * to_end.permute(0, 1, 4, 2, 3)[..., None])
    whole = total[..., -1].exp()[..., None, None]
    state = x.new_zeros(b, h, p, n) if initial_state is None else initial_state
    state = state.unflatten(1, (groups, h // groups))
    entering = []
    for c in range(contributions.shape[1]):
        entering.append(state)
        state = whole[:, c] * state + contributions[:, c]
    from_start = total.exp().permute(0, 1, 4, 2, 3)[..., None]
    y = y + torch.einsum("bcign,bcgrpn->bcigrp", C, torch.stack(entering, dim=1)) * from_start

    y = y.flatten(1, 2)[:, :length].reshape(b, length, h, p)
    return (y if D is None else y + D[:, None] * x), state.flatten(1, 2)
