"""What runs a bucket whose backend fails: the next best one where it was chosen automatically; else an error."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from .dispatch import Choice, LaunchError, Request, next_best, this_machine
from .kernels.language import RuleError
from .layout import local_gradient
from .once import warn_once

if TYPE_CHECKING:
    from .bucket import Bucket, Key
    from .members import Member
    from .optimizer import RuleOptimizer

DOCTOR = "`triton-optim doctor` shows whether a launch works on this machine."


def prepared(optimizer: RuleOptimizer, members: dict[Key, list[Member]]) -> dict[Key, list[Member]]:
    """The buckets with all compiled and loaded that they need. One that was chosen automatically and fails is run by
    the next best backend, at last eagerly, which needs nothing.
    """
    from .plan import bucket_class

    ready: dict[Key, list[Member]] = {}
    for wanted, own in members.items():
        key = optimizer.failed.get(wanted, wanted)
        while key.choice.backend != "eager" or key is wanted:
            try:
                bucket_class(key).prepare(optimizer, key, own)
                break
            except RuleError:
                raise
            except Exception as error:
                key = instead_of(optimizer, key, error)
                optimizer.failed[wanted] = key
        ready.setdefault(key, []).extend(own)
    return ready


def instead_of(optimizer: RuleOptimizer, key: Key, error: Exception) -> Key:
    """What a bucket becomes whose backend fails. Warns, once for an optimizer and kind of bucket.

    Raises:
        RuntimeError: the backend was asked for by name.
    """
    name, failed = type(optimizer).__name__, key.choice.backend
    if isinstance(error, LaunchError):
        reason, advice = str(error), f" {DOCTOR}"
    else:
        lines = str(error).strip().splitlines() or [""]
        reason, advice = f"the {failed} backend failed to compile: {type(error).__name__}: {lines[0]}", ""
    if optimizer.backend != "auto":
        raise RuntimeError(
            f'backend="{optimizer.backend}" cannot run {name}: {reason}. Leave backend out to fall back to '
            f"another.{advice}"
        ) from error
    said = any(reason == key.choice.reason for key in optimizer.failed.values())
    backend = next_best(failed, Request(key.device.type, key.dtypes[0]), this_machine())
    if backend == "eager" and not said:
        warnings.warn(f"{name} runs eagerly: {reason}.{advice}", RuntimeWarning, stacklevel=2)
    elif not said:
        warn_once(f"{reason}. The {backend} backend runs the steps instead.")
    return key._replace(choice=Choice(backend, reason), aligned=False)


def replaced(optimizer: RuleOptimizer, bucket: Bucket, error: LaunchError) -> Bucket:
    """A bucket of another backend with the same members and gradients, for a step of which nothing was done yet.

    Raises:
        RuntimeError: the backend was asked for by name.
    """
    from .plan import bucket_class

    key = optimizer.failed[bucket.key] = instead_of(optimizer, bucket.key, error)
    for cohort in bucket.cohorts:
        numbers = cohort.numbers()
        for m in cohort.members:
            m.numbers = numbers
    own = bucket.gradients
    if not own:  # only where they lie was asked
        own = [None if m.p.grad is None else local_gradient(m.p, m.p.grad) for m in bucket.members]
    gradients = {m.index: g for m, g in zip(bucket.members, own, strict=True)}
    new = bucket_class(key)(optimizer, key, bucket.members)
    if not new.fits(gradients):
        raise RuntimeError("a parameter or state changed during the step. Let no other thread write them.")
    return new
