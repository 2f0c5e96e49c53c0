"""What the trainers that people use need: a module a trainer, which is imported only where one imports it here, and
the optimizer inside what a trainer makes of it. ``docs/trainers`` has a page each.
"""

from ..core.unwrap import unwrap_model, unwrap_optimizer

__all__ = ["unwrap_model", "unwrap_optimizer"]
