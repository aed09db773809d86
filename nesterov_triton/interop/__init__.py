"""The torchdiffeq-shaped front door: `from nesterov_triton import odeint_adjoint as odeint`.

Signatures and meaning are torchdiffeq's 0.2.5; the work is done by this package's systems, loops and gradients, which
know nothing of it. Here names, states, norms, options and times are translated, and nothing else:

- `states`: tensor, tuple and complex states as one flat real tensor, and back;
- `norms`: tolerances and norms of such states as the loop's measure of an error;
- `options`: the options of a method, checked, as what the loop is told;
- `odeint`: the two solves; `events`: until an event; `dense`: as a function of time.
"""

from nesterov_triton.interop.dense import odeint_dense
from nesterov_triton.interop.events import odeint_event
from nesterov_triton.interop.odeint import odeint, odeint_adjoint

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
