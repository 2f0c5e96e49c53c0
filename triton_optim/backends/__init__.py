"""The four ways to run a rule, a folder each."""

from __future__ import annotations

import importlib
from typing import cast

from ..buckets.bucket import Bucket
from ..buckets.key import Key
from ..dispatch import Backend

_BUCKETS: dict[Backend, str] = {
    "triton": "TritonBucket",
    "cpp": "CppBucket",
    "compiled": "CompiledBucket",
    "eager": "EagerBucket",
}


def bucket_class(key: Key) -> type[Bucket]:
    """The class that runs a bucket. Imported on demand: a backend may need what is not installed."""
    backend = key.choice.backend
    module, name = ("eager.sparse", "SparseBucket") if key.sparse else (f"{backend}.bucket", _BUCKETS[backend])
    return cast(type[Bucket], getattr(importlib.import_module(f".{module}", __package__), name))
