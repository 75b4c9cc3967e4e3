"""One image by several GPUs, each of which computes a part of every step.

torchrun --nproc-per-node 4 -m examples.torchrun_image --model-path black-forest-labs/FLUX.1-dev
"""

import argparse
import os

import torch
from diffusers import FluxPipeline

from examples.demo_model.prompts import DEMO_CALL, WEIGHTS
from pipeboost import accelerate_pipeline
from pipeboost.distributed import local_device

parser = argparse.ArgumentParser()
parser.add_argument("--model-path", default=str(WEIGHTS), help="a hub id or a folder; the demo model by default")
parser.add_argument("--prompt", default="a large yellow moon in the top left corner, lavender background")
parser.add_argument("--out", default="image.png")
given = parser.parse_args()

device = local_device()
pipe = FluxPipeline.from_pretrained(given.model_path, torch_dtype=torch.bfloat16 if device.type == "cuda" else None)
accelerate_pipeline(pipe.to(device))
size = DEMO_CALL if given.model_path == str(WEIGHTS) else {}
image = pipe(given.prompt, **size, generator=torch.Generator("cpu").manual_seed(0)).images[0]
if os.environ.get("RANK", "0") == "0":
    image.save(given.out)
    print(pipe.acceleration.plan)
