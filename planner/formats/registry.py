"""The loaders that `relibra convert` offers for records of one sequence each, by name: `@loader` adds one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..trace import RoutingTrace

F = TypeVar("F", bound=Callable[..., RoutingTrace])


@dataclass(frozen=True)
class Loader:
    """load: from (records, num_experts, `SequenceOptions`) to a trace. holds: the file that is read, in a few words."""

    load: Callable[..., RoutingTrace]
    holds: str


LOADERS: dict[str, Loader] = {}


def loader(name: str, holds: str) -> Callable[[F], F]:
    """Offer the function as `relibra convert --from NAME`.

    Args:
        name: of the engine or trainer, in lower case.
        holds: what its file or folder holds, for `relibra convert --help`.
    """

    def register(function: F) -> F:
        LOADERS[name] = Loader(function, holds)
        return function

    return register
