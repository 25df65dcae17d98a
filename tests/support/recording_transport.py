"""A transport that does what another one does and writes down what it is asked for."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from relibra_kernels.parallel.tokens.transport import Transport

METHODS = ("dispatch", "dispatch_rows", "combine", "combine_gradients")


class RecordingTransport:
    """A `Transport`.

    Attributes:
        calls: (method of the transport or of a path, kind of exchange or "", layer of the tables or -1), in order.
    """

    def __init__(self, inner: Transport):
        self.name, self.host, self.buffers = inner.name, inner.host, inner.buffers
        self.calls: list[tuple[str, str, int]] = []
        self._inner = inner

    def tables(self, *arguments: Any) -> Any:
        return self._noted("tables", *arguments)

    def messages(self, *arguments: Any) -> Any:
        return self._noted("messages", *arguments)

    def sizes(self, *arguments: Any) -> Any:
        return self._noted("sizes", *arguments)

    def arrivals(self, *arguments: Any) -> Any:
        return self._noted("arrivals", *arguments)

    def hops(self, *arguments: Any) -> Any:
        return self._inner.hops(*arguments)

    def path(self, *arguments: Any) -> "RecordingPath":
        layer = sum(name == "path" for name, _, _ in self.calls)
        return RecordingPath(self._noted("path", *arguments), self.calls, layer)

    def _noted(self, name: str, *arguments: Any) -> Any:
        self.calls.append((name, "", -1))
        return getattr(self._inner, name)(*arguments)


class RecordingPath:
    """A `TokenPath`."""

    def __init__(self, inner: Any, calls: list[tuple[str, str, int]], layer: int):
        self._inner, self._calls, self._layer = inner, calls, layer

    @property
    def groups(self) -> Any:
        return self._inner.groups

    def prepare(self, *arguments: Any) -> None:
        self._inner.prepare(*arguments)

    @property
    def assignments(self) -> int:
        return self._inner.assignments

    def dispatch(self, x_TH: Tensor, weights_TK: Tensor, kind: str) -> Sequence[Callable[[], Any]]:
        return self._noted("dispatch", kind, x_TH, weights_TK)

    def dispatch_rows(self, rows_TH: Tensor, kind: str) -> Sequence[Callable[[], Tensor]]:
        return self._noted("dispatch_rows", kind, rows_TH)

    def room(self, *arguments: Any) -> Tensor:
        return self._inner.room(*arguments)

    def combine(self, kind: str) -> Tensor:
        return self._noted("combine", kind)

    def combine_gradients(self, partials: Any, kind: str, dtype: Any) -> Any:
        self._calls.append(("combine_gradients", kind, self._layer))
        return self._inner.combine_gradients(partials, kind, dtype)

    def _noted(self, name: str, kind: str, *arguments: Any) -> Any:
        self._calls.append((name, kind, self._layer))
        return getattr(self._inner, name)(*arguments, kind)
