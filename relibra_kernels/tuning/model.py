"""How long a launch would take with a config: what an offline search ranks by, and what spares a clock the hopeless."""

from .configs import Config, GemmConfig
from .gemm_model import estimate_gemm
from .products import Product
from .row_model import estimate_rows
from .work import Estimate, Resources, Work


def estimate(work: Work, config: Config, resources: Resources, product: Product) -> Estimate:
    """The time of `work` with `config`, which needs `resources`, on `product`. Modelled; good for ordering configs."""
    if isinstance(config, GemmConfig):
        return estimate_gemm(work, config, resources, product)
    return estimate_rows(work, config, resources, product)
