"""What runs a bucket whose backend fails: the next best one where it was chosen automatically; else an error."""

from __future__ import annotations

import warnings

from ..backends import bucket_class
from ..buckets.bucket import Bucket
from ..buckets.key import Key
from ..buckets.slots import ParamSlot
from ..buckets.step_scalars import check_scalars
from ..dispatch import Choice, LaunchError, Request, next_best, this_machine
from ..kernels.source import RuleError
from ..spec import Update
from ..util.layout import local_gradient
from ..util.once import warn_once

DOCTOR = "`triton-optim doctor` shows whether a launch works on this machine."


def prepared(
    optimizer: Update, failed: dict[Key, Key], slots: dict[Key, list[ParamSlot]]
) -> dict[Key, list[ParamSlot]]:
    """The buckets, with all that they need compiled and loaded. One that was chosen automatically and fails is run by
    the next best backend, at last eagerly, which needs nothing.
    """
    ready: dict[Key, list[ParamSlot]] = {}
    for wanted, own in slots.items():
        key = failed.get(wanted, wanted)
        check_scalars(optimizer, key)  # no backend could mend an error there
        while key.choice.backend != "eager" or key is wanted:
            try:
                bucket_class(key).compile(optimizer, key, own)
                break
            except RuleError:
                raise
            except Exception as error:
                key = instead_of(optimizer, failed, key, error)
                failed[wanted] = key
        ready.setdefault(key, []).extend(own)
    return ready


def instead_of(optimizer: Update, failed: dict[Key, Key], key: Key, error: Exception) -> Key:
    """The key that replaces that of a bucket whose backend fails. Warns, once for an optimizer and kind of bucket.

    Raises:
        RuntimeError: the backend was asked for by name.
    """
    name, backend_failed = type(optimizer).__name__, key.choice.backend
    if isinstance(error, LaunchError):
        reason, advice = str(error), f" {DOCTOR}"
    else:
        lines = str(error).strip().splitlines() or [""]
        reason, advice = f"the {backend_failed} backend failed to compile: {type(error).__name__}: {lines[0]}", ""
    if optimizer.backend != "auto":
        raise RuntimeError(
            f'backend="{optimizer.backend}" cannot run {name}: {reason}. Leave backend out to fall back to '
            f"another.{advice}"
        ) from error
    said = any(reason == key.choice.reason for key in failed.values())
    backend = next_best(backend_failed, Request(key.device.type, key.dtypes[0]), this_machine())
    if backend == "eager" and not said:
        warnings.warn(f"{name} runs eagerly: {reason}.{advice}", RuntimeWarning, stacklevel=2)
    elif not said:
        warn_once(f"{reason}. The {backend} backend runs the steps instead.")
    return key._replace(choice=Choice(backend, reason), aligned=False)


def replaced(optimizer: Update, failed: dict[Key, Key], bucket: Bucket, error: LaunchError) -> Bucket:
    """A bucket of another backend with the same parameters and gradients, for a step of which nothing was done yet.

    Raises:
        RuntimeError: the backend was asked for by name.
    """
    key = failed[bucket.key] = instead_of(optimizer, failed, bucket.key, error)
    for step_group in bucket.step_groups:
        numbers = step_group.numbers()
        for m in step_group.slots:
            m.numbers = numbers
    own = bucket.gradients
    if not own:  # only where they lie was asked
        own = [None if m.p.grad is None else local_gradient(m.p, m.p.grad) for m in bucket.slots]
    gradients = {m.index: g for m, g in zip(bucket.slots, own, strict=True)}
    new = bucket_class(key)(optimizer, key, bucket.slots)
    if not new.bind(gradients):
        raise RuntimeError("a parameter or state changed during the step. Let no other thread write them.")
    return new
