"""The selective scan (Mamba-1, Gu & Dao 2023) in plain PyTorch: the recurrence as it is written.

state_t = exp(delta_t A) state_{t-1} + delta_t x_t B_t          state [e,n]
y_t     = state_t C_t + D x_t                                    each of the e channels for itself
"""

import torch


def selective_scan_sequential(x, delta, A, B, C, *, D=None, initial_state=None):
    """Walks the recurrence position by position: the definition.

    Args:
      x: [b,l,e] inputs.
      delta: [b,l,e] step sizes, not negative.
      A: [e,n], negative.
      B, C: [b,l,n], shared by all channels.
      D: [e] or None for no skip.
      initial_state: [b,e,n] or None for zeros.

    Returns:
      y [b,l,e] and the final state [b,e,n].
    """
    state = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        state = decay * state + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = torch.stack(outputs, dim=1)
    return (y if D is None else y + D * x), state
