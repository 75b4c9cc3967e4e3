"""`digest` tells values apart on any rank, `identity` within a process; a tracked module sees every change."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import nn

from pipeboost.core.fingerprint import digest, identity, sums
from pipeboost.core.tracked_module import SAMPLED, TrackedModule
from pipeboost.features.parallel.running_state import facts_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int32, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 7, 8, 2**14 * 8 + 3])
def test_a_digest_depends_on_the_order_and_every_element(dtype, count):
    values = (torch.arange(count) % 64).to(dtype)
    swapped, changed, later = values.clone(), values.clone(), values.roll(1)
    swapped[0], swapped[-1] = values[-1], values[0]
    changed[-1] = 65
    found = [digest(each) for each in (values, swapped, changed, later)]
    assert len(set(found)) == (4 if count > 2 else 3)
    assert digest(values.clone()) == found[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_digest_tells_whose_the_signs_are(dtype):
    signs = torch.eye(32, dtype=dtype) * -2 + 1
    assert len({digest(each) for each in signs}) == 32


def test_a_digest_is_of_the_content_wherever_and_however_it_lies():
    values = torch.arange(24, dtype=torch.bfloat16)
    assert digest(values[1:]) == digest(values[1:].clone())
    assert digest(values.reshape(4, 6).T) == digest(values.reshape(4, 6).T.contiguous())
    assert digest(values.expand(3, 24)) == digest(values.expand(3, 24).clone())
    image = torch.arange(48.0).reshape(1, 3, 4, 4)
    assert digest(image.to(memory_format=torch.channels_last)) == digest(image)
    assert digest(torch.complex(image, image).conj()) == digest(torch.complex(image, -image))
    assert digest(nn.Parameter(image)) == digest(image)


def test_a_digest_tells_dtype_and_shape_of_tensors_of_the_same_bits():
    zeros = [
        torch.zeros(shape, dtype=dtype) for shape in ((), (0,), (0, 2), (4,), (2, 2)) for dtype in (*DTYPES, torch.bool)
    ]
    assert len({digest(each) for each in zeros}) == len(zeros)
    flags = [torch.tensor(each) for each in ([True, False], [False, True], [True, True])]
    assert len({digest(each) for each in flags}) == 3
    assert digest(torch.tensor(float("nan"))) == digest(torch.tensor(float("nan")))


def test_sums_come_in_the_order_of_their_tensors():
    tensors = [
        torch.full((5,), float(value), dtype=dtype) for value in range(3) for dtype in (torch.half, torch.double)
    ]
    assert sums(tensors) == [sums([each])[0] for each in tensors]


def test_a_digest_is_the_same_in_another_process():
    value = "{'b': torch.arange(5).half(), 'a': [{'x', 'y', 'z'}, 1.5, None], 'c': torch.nn.Linear}"
    program = f"import torch; from pipeboost.core.fingerprint import digest; print(digest({value}).hex())"
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.split()[-1] == digest(eval(value)).hex()


def test_an_identity_is_of_the_object_and_its_version_and_keeps_nothing_alive():
    tensor, other = torch.zeros(3), object()
    value = {"tensors": [tensor], "flag": True, "other": other}
    known = identity(value)
    assert known == identity(copy.copy(value))
    assert hash(known) == hash(identity(copy.copy(value)))
    assert known != identity({**value, "flag": 1})
    assert known != identity({**value, "tensors": [tensor.clone()]})
    assert identity({1.0: math.nan}) == identity({1.0: math.nan})
    tensor.add_(1)
    assert known != identity(value)
    known = identity(tensor)
    address = id(tensor)
    del tensor, value
    assert known == known
    assert all(identity(each) != known for each in [torch.zeros(3) for _ in range(50)] if id(each) == address)


class Block(nn.Module):
    """A block with settings of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0)) for _ in range(2)])
        self.act = nn.SiLU()
        self.scale = {"a": 1.0}
        self.register_buffer("table", torch.ones(4))


def _replace(module):
    module[0].linears[0][0] = nn.Linear(8, 8)


CHANGES = {
    "data": lambda module: module[0].linears[0][0].weight.data.mul_(2),
    "data and a setting": lambda module: (module[0].linears[0][0].weight.data.mul_(2), module[1].scale.clear()),
    "in place": lambda module: module[0].linears[0][0].weight.data.copy_(torch.ones(8, 8)),
    "one element": lambda module: module[0].linears[1][0].bias.detach()[3:4].add_(1),
    "buffer": lambda module: module[1].table.add_(1),
    "parameter": lambda module: setattr(module[0].linears[0][0], "weight", nn.Parameter(torch.zeros(8, 8))),
    "submodule": _replace,
    "new submodule": lambda module: module[0].add_module("more", nn.SiLU()),
    "setting in place": lambda module: module[1].scale.update(a=2.0),
    "new setting": lambda module: setattr(module[1], "window", 5),
    "dtype": lambda module: module.double(),
    "class": lambda module: setattr(module[0], "act", nn.GELU()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tracked_module_sees_a_change_and_reads_only_what_was_written_to(change, monkeypatch):
    module = nn.Sequential(Block(), Block())
    tracked = TrackedModule(module)
    before = tracked.digest()
    assert tracked.is_current
    CHANGES[change](module)
    assert not tracked.is_current
    read = []
    monkeypatch.setattr("pipeboost.core.tracked_module.sums", lambda tensors: read.extend(tensors) or sums(tensors))
    assert tracked.digest() != before
    assert len(read) == {
        "data": 1,
        "data and a setting": 1,
        "parameter": 1,
        "one element": 1,
        "buffer": 1,
        "submodule": 2,
    }.get(change, len(read))
    assert change not in ("setting in place", "new setting", "class", "new submodule") or not read
    assert tracked.is_current
    assert tracked.digest() == TrackedModule(copy.deepcopy(module)).digest()


def test_a_write_through_data_is_seen_in_as_many_calls_as_the_weights_have_turns():
    module = nn.Sequential(*[nn.Linear(4, 4) for _ in range(SAMPLED)])
    tracked = TrackedModule(module)
    before = tracked.digest()
    module[7].weight.data.mul_(2)
    assert not all([tracked.is_current for _ in range(2)])
    assert tracked.digest() != before


def test_what_is_forgotten_is_read_again_and_other_writes_are_seen_meanwhile():
    module = nn.Sequential(Block(), Block())
    tracked = TrackedModule(module)
    before = tracked.digest()
    weight = module[0].linears[0][0].weight
    tracked.forget(named="0.linears.0")
    weight.data[5, 5] += 1
    module[1].table.data.mul_(2)
    assert not tracked.is_current
    assert tracked.digest() == TrackedModule(copy.deepcopy(module)).digest() != before


@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
def test_what_a_call_leaves_in_a_scheduler_does_not_count_and_what_is_set_on_it_does(cls):
    scheduler = cls()
    before = digest(facts_of(scheduler))
    scheduler.set_timesteps(3)
    scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], torch.ones(1, 2))
    assert digest(facts_of(scheduler)) == before
    if cls is FlowMatchEulerDiscreteScheduler:
        scheduler.set_shift(4.0)
    else:
        scheduler.disable_corrector = [0]
    assert digest(facts_of(scheduler)) != before


def test_ranks_may_have_devices_of_their_own_of_one_kind():
    here, there = ({"device_map": {"": torch.device("cuda", index)}} for index in (0, 1))
    assert digest(here) == digest(there)
    assert digest(here) != digest({"device_map": {"": torch.device("cpu")}})
    modules = [torch.nn.Linear(2, 2) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    blocks = [torch.nn.ModuleList([module]) for module in modules]

    class Adapter(torch.nn.Module):
        pass

    for index, block in enumerate(blocks):
        block.append(Adapter())
        block[1].kwargs = {"device_map": {"": torch.device("cuda", index)}}
    assert TrackedModule(blocks[0]).digest() == TrackedModule(blocks[1]).digest()
