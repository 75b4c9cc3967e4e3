"""Weights that several GPUs split wait on the host: no GPU ever holds them whole, and there they are whole again."""

import pytest
import torch

from tests.distributed.failure_ranks import on_mortal_ranks
from tests.gpu import split_gpu_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs several CUDA devices"),
]


@pytest.mark.parametrize("name", ["flux_dev", "wan21_t2v"])
def test_weights_that_wait_on_the_host_are_split_there_and_give_the_same(name):
    for outcome in on_mortal_ranks(2, cases.split_on_the_host, name, 2, limit=180.0, start="spawn"):
        assert outcome.answer is not None, outcome.printed
        found = outcome.answer
        print(name, found)
        assert found["difference"] == 0.0
        assert found["devices"] == ({"cuda"}, {"cpu"})
        assert found["same"]
        assert found["peak"] < found["peak, moved whole"]
