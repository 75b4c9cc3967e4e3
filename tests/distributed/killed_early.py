"""A process for `test_failures`: rank of a world that no launcher watches, of which one is killed at once."""

import os
import signal
import sys

if os.environ["RANK"] == sys.argv[1]:
    os.kill(os.getpid(), signal.SIGKILL)

import torch

from pipeboost.core.errors import RankFailedError
from pipeboost.distributed import Mesh, local_processes

local_processes._STARTS = 2.0  # seconds in which processes of two ranks begin that are started in one breath
try:
    Mesh({"ulysses": 2}, device=torch.device("cpu"))
except RankFailedError as error:
    print(error)
