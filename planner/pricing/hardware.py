"""What cost.py needs to know of models and machines. Every figure with where it is from."""

from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one MoE layer and of the attention beside it, from the model's published config.json."""

    name: str
    layers: int  # MoE layers
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    shared_intermediate: int = 0  # shared experts, run on every rank for its own tokens

    @property
    def expert_parameters(self) -> int:
        """gate, up and down projection."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert in bf16."""
        return 2 * self.expert_parameters

    @property
    def gradient_bytes(self) -> int:
        """Gradient of one expert; summed in fp32, so returned in fp32."""
        return 4 * self.expert_parameters

    @property
    def migration_bytes(self) -> int:
        """bf16 weights, fp32 master weights and both Adam moments of one expert."""
        return (2 + 4 + 4 + 4) * self.expert_parameters

    def assignment_flops(self) -> int:
        """Forward, of one token in one expert: a multiply and an add per parameter."""
        return 2 * self.expert_parameters

    def dense_flops(self, sequence_length: int) -> int:
        """Forward, of one token outside the routed experts: projections, causal attention, shared experts."""
        width = self.heads * self.head_dim
        projections = 2 * self.hidden * (2 * width + 2 * self.kv_heads * self.head_dim)
        attention = 2 * 2 * width * sequence_length // 2
        return projections + attention + 2 * 3 * self.hidden * self.shared_intermediate


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("Qwen3-30B-A3B", 48, 128, 8, 2048, 768, 32, 4, 128),
        ModelShape("GLM-4.5-Air", 45, 128, 8, 4096, 1408, 96, 8, 128, shared_intermediate=1408),
        ModelShape("Qwen3-235B-A22B", 94, 128, 8, 4096, 1536, 64, 4, 128),
    )
}


@dataclass(frozen=True)
class DeviceSpec:
    """One GPU and its share of the two networks; bytes per second in one direction.

    efficiency: achieved over peak, for grouped GEMMs and for the dense part alike. 0.5 is what SonicMoE reports for
                full MoE layers on H100 (430-597 of 989 TFLOP/s); no measurement of ours stands behind it.
    link_efficiency: achieved over nominal bandwidth for large messages; 0.8 is usual for NCCL all-to-all.
    """

    name: str
    peak_flops: float  # bf16, dense
    fast_bandwidth: float  # inside a node
    slow_bandwidth: float  # between nodes
    efficiency: float = 0.5
    link_efficiency: float = 0.8

    @property
    def flops(self) -> float:
        return self.peak_flops * self.efficiency

    @property
    def fast(self) -> float:
        return self.fast_bandwidth * self.link_efficiency

    @property
    def slow(self) -> float:
        return self.slow_bandwidth * self.link_efficiency


# Vendors' data sheets: dense bf16; NVLink 4 is 900 GB/s and NVLink 5 is 1800 GB/s in both directions together, Infinity
# Fabric 7 links of 64 GB/s in each; 400 Gb/s of network a GPU.
DEVICES = {
    device.name: device
    for device in (
        DeviceSpec("8xH100", 989e12, 450e9, 50e9),
        DeviceSpec("8xH200", 989e12, 450e9, 50e9),
        DeviceSpec("8xB200", 2250e12, 900e9, 50e9),
        DeviceSpec("8xMI300X", 1307e12, 448e9, 50e9),
    )
}


def find_model(name: str) -> ModelShape:
    if name not in MODELS:
        raise InputError(f"model {name!r} is not known; known are {', '.join(MODELS)}")
    return MODELS[name]


def find_device(name: str) -> DeviceSpec:
    if name not in DEVICES:
        raise InputError(f"device {name!r} is not known; known are {', '.join(DEVICES)}")
    return DEVICES[name]
