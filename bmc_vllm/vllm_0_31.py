"""What vLLM 0.31 lacks of 0.32's plugin interface. It can go when the tested range begins later.

Promises that with 0.32 everything here is vLLM's own.
"""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


def register_attention_backend(name: str, class_path: str) -> None:
    """Makes `name` a member of vLLM's registry; 0.31 can only replace the class of a member."""
    if hasattr(AttentionBackendEnum, "register"):
        register_backend(name, class_path)
        return
    # What 0.32 does for a new name.
    member = object.__new__(AttentionBackendEnum)
    member._name_ = name
    member._value_ = class_path
    setattr(AttentionBackendEnum, name, member)
    AttentionBackendEnum._member_map_[name] = member
    AttentionBackendEnum._value2member_map_[class_path] = member
    AttentionBackendEnum._member_names_.append(name)
