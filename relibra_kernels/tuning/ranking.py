"""How long a launch would take with a config.

The offline search ranks configs by it. The online search asks it which configs are too slow to be worth timing.
"""

from ..configs.config import Config, GemmConfig
from ..configs.products import Product
from .gemm_model import estimate_gemm
from .launch_model import LaunchEstimate, Resources, Work
from .row_model import estimate_rows


def estimate(work: Work, config: Config, resources: Resources, product: Product) -> LaunchEstimate:
    """The time of `work` with `config`, which needs `resources`, on `product`. Modelled; good for ordering configs."""
    if isinstance(config, GemmConfig):
        return estimate_gemm(work, config, resources, product)
    return estimate_rows(work, config, resources, product)
