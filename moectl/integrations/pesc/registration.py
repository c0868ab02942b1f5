"""PEFT registers methods of its own enum only, so a method from outside has to become a member of it first."""

from __future__ import annotations

from peft import PeftType


def add_peft_type(name: str) -> None:
    """Make `name` a member of PEFT's `PeftType`, as if it stood in its source.

    An enum is closed once its class is made; what Python keeps about its members are these three tables and the class
    attribute, in every version since 3.11.
    """
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
