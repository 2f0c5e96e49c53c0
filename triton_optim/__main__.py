"""``python -m triton_optim``."""

from .cli import main

raise SystemExit(main())
