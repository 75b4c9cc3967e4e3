"""Python objects between ranks, by way of the CPU."""

from __future__ import annotations

import pickle
from typing import Any

import torch

from pipeboost.distributed.authentication import shared_secret, sign, verify
from pipeboost.distributed.collectives.groups import Group


def gather(group: Group, value: Any) -> list[Any]:
    """What each rank of a group that carries CPU tensors has, in the order of the group."""
    own = torch.frombuffer(bytearray(sign(pickle.dumps(value), group.name, shared_secret())), dtype=torch.uint8)
    lengths = group.all_gather(torch.tensor([own.numel()]), 0, [1] * group.size).tolist()
    everyone = group.all_gather(own, 0, lengths)
    messages = [part.numpy().tobytes() for part in everyone.split(lengths)]
    return [pickle.loads(verify(message, group.name, shared_secret())) for message in messages]
