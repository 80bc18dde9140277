"""Encoder and connector through torch.compile in two processes: the losses of one process without it. Slow."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2-frozen": {"parallel": "fsdp2", "sharding.shard": "full", "sharding.shard_frozen": True},
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_parts_learn_the_same(values: Any, ranks: Any, programs: Any) -> None:
    common = {"epochs": None, "max_steps": 3, "optim.eps": 1e-3, "stall_seconds": 0}
    (plain,) = programs.train([{"values": values(common, output="plain")}])
    compiled = {**common, "compile": "vision_tower,multi_modal_projector"}
    jobs = [{"values": values({**compiled, **more}, output=name)} for name, more in SETTINGS.items()]
    ends = ranks("train", jobs, seconds=600.0)
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    for name, *both in zip(SETTINGS, *(end.value for end in ends), strict=True):
        for each in both:
            assert each["outcome"] == "finished", each
            assert each["losses"] == pytest.approx(plain["losses"], abs=1e-4), name
