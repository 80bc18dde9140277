"""Several processes that work together: who started them, starting them, and what they tell one another."""

from vlmamba.common.processes.group import Group
from vlmamba.common.processes.launch import Launch, pick_device, read_launch
from vlmamba.common.processes.spawn import EXIT_STOPPED, STOP_SIGNALS, end_with_parent, spawn_asked

__all__ = [
    "EXIT_STOPPED",
    "STOP_SIGNALS",
    "Group",
    "Launch",
    "end_with_parent",
    "pick_device",
    "read_launch",
    "spawn_asked",
]
