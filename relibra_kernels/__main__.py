"""`python -m relibra_kernels` is the `relibra` program."""

import sys

from .cli import main

sys.exit(main())
