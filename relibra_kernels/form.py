"""How one model family lays out its experts' weights and gates them."""

from dataclasses import dataclass
from typing import Literal, get_args

from .planner.errors import InputError

Activation = Literal["silu", "clamped", "clamped_silu", "capped_silu", "gelu_tanh", "relu2"]


@dataclass(frozen=True)
class ExpertForm:
    """Flags named as Hugging Face names them, so that a module's flags can be copied over.

    Attributes:
        is_transposed: weights are `[E, in, out]` (gpt-oss) instead of `[E, out, in]`.
        is_concatenated: the `2I` columns of gate_up are `[gate; up]`; False: gate and up alternate (gpt-oss).
        has_bias: both projections add a bias, `[E, 2I]` (laid out like the columns of gate_up) and `[E, H]`.
        activation: "silu": silu(gate) * up. "gelu_tanh": gelu(gate) * up, in its form with tanh.
            "clamped" (gpt-oss): with gate <= limit and |up| <= limit, gate * sigmoid(alpha * gate) * (up + 1).
            "clamped_silu": with gate <= limit and |up| <= limit, silu(gate) * up.
            "capped_silu": with |up| <= limit, min(silu(gate), limit) * up.
            "relu2" (Nemotron-H): max(up, 0)^2, without a gate. What is called gate_up elsewhere is then up alone, with
            `I` columns.
        limit: of the three activations that have one. alpha: of "clamped" alone.
    """

    is_transposed: bool = False
    is_concatenated: bool = True
    has_bias: bool = False
    activation: Activation = "silu"
    limit: float = 7.0
    alpha: float = 1.702

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            names = ", ".join(map(repr, get_args(Activation)))
            raise InputError(f"activation is {self.activation!r}; it must be one of {names}")
        if not self.limit > 0:
            raise InputError(f"limit is {self.limit}; it must be positive")
        if not (self.has_gate or self.is_concatenated):
            raise InputError(f"is_concatenated is False; it must be True with {self.activation!r}, which has no gate")

    @property
    def has_gate(self) -> bool:
        return self.activation != "relu2"

    @property
    def first_name(self) -> str:
        """What Hugging Face calls the weight that comes first."""
        return "gate_up_proj" if self.has_gate else "up_proj"

    def width(self, intermediate_size: int) -> int:
        """Columns of h, the first product: gate and up, or up alone."""
        return 2 * intermediate_size if self.has_gate else intermediate_size

    def intermediate_size(self, width: int) -> int:
        """The intermediate size whose h has so many columns: the opposite of `width`."""
        return width // 2 if self.has_gate else width

    def gate_up_shape(self, hidden_size: int, intermediate_size: int) -> tuple[int, int]:
        """Shape of one expert's gate_up weight."""
        shape = (self.width(intermediate_size), hidden_size)
        return shape[::-1] if self.is_transposed else shape

    def down_shape(self, hidden_size: int, intermediate_size: int) -> tuple[int, int]:
        """Shape of one expert's down weight."""
        shape = (hidden_size, intermediate_size)
        return shape[::-1] if self.is_transposed else shape


GPT_OSS = ExpertForm(is_transposed=True, is_concatenated=False, has_bias=True, activation="clamped")
