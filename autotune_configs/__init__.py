"""Kernel configurations, one folder a device, as JSON. Data only: `relibra_kernels.tuning` reads them."""
