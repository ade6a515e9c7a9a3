"""Replace a method of one object.

oneDNN and float8 products, activation checkpointing, `torch.compile` and the weight casts of FSDP2 all use this
function to change how a module computes after it was built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def replace_method(owner: object, name: str, function: Callable[..., Any]) -> None:
    """Let `owner.name(...)` call `function(...)`, on this object only.

    The attribute of the object hides the method of its class. Parameters, their names and `state_dict` do not change.
    To wrap the current method instead of replacing it, pass a function that calls `owner.name` as it is now:
    `replace_method(block, "forward", torch.compile(block.forward))`.

    Raises:
        AttributeError: `owner` has no method of this name.
    """
    if not callable(getattr(owner, name, None)):
        raise AttributeError(f"{type(owner).__name__} has no method {name!r} to replace")
    setattr(owner, name, function)
