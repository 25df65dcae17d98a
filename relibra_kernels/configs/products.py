"""GPUs by name, as the planner's table has them: what configs are shipped for, and the rates to rank them by."""

from ..planner.pricing.gpus import GPUS as PRODUCTS
from ..planner.pricing.gpus import Gpu as Product
from ..planner.pricing.gpus import find_gpu as product_named
from ..planner.pricing.gpus import gpu_of as product_of

__all__ = ["PRODUCTS", "Product", "product_named", "product_of"]
