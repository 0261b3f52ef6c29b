"""Numbers on their way between the training thread and the device, without waiting for it."""

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the host, on `device`: a GPU takes them when it comes to them, from memory that
    is pinned, else it would be waited for."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Delayed:
    """Hands out small tensors one step late, when the device has them; on CPUs at once.

    Args:
        late: whether to be late; None: on GPUs.
    """

    def __init__(self, late: bool | None = None):
        self._late = late
        self._waiting: tuple[Tensor, torch.cuda.Event | None] | None = None

    def put(self, values: Tensor) -> list[float] | None:
        """Take (n,) `values`; returns those of the call before, or on CPUs these."""
        late = values.is_cuda if self._late is None else self._late
        if not late:
            return values.tolist()
        before, event = self.flush(), None
        host = values.to("cpu", non_blocking=True)
        if values.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._waiting = (host, event)
        return before

    def peek(self) -> list[float] | None:
        """What has not been handed out yet, if anything; waits for the device."""
        if self._waiting is None:
            return None
        host, event = self._waiting
        if event is not None:
            event.synchronize()
        return host.tolist()

    def flush(self) -> list[float] | None:
        """Hand out what has not been yet; waits for the device."""
        values, self._waiting = self.peek(), None
        return values
