"""One video by several GPUs; guidance first, then the tokens are shared among them.

torchrun --nproc-per-node 4 -m examples.torchrun_video --prompt "a cat walks on the grass"
"""

import argparse
import os
from pathlib import Path

import torch
from diffusers import WanPipeline

from pipeboost import GeneratedVideo, accelerate_pipeline
from pipeboost.distributed import local_device

parser = argparse.ArgumentParser()
parser.add_argument("--model-path", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="a hub id or a folder")
parser.add_argument("--prompt", default="a cat walks on the grass")
for name, value in {"height": 480, "width": 832, "num-frames": 81, "num-inference-steps": 50}.items():
    parser.add_argument(f"--{name}", type=int, default=value)
parser.add_argument("--out", type=Path, default=Path("video.mp4"))
call = vars(parser.parse_args())
path, out, device = call.pop("model_path"), call.pop("out"), local_device()
pipe = WanPipeline.from_pretrained(path, torch_dtype=torch.bfloat16 if device.type == "cuda" else None).to(device)
accelerate_pipeline(pipe)
frames = pipe(**call, generator=torch.Generator("cpu").manual_seed(0)).frames[0]
if os.environ.get("RANK", "0") == "0":
    pixels = (frames * 255).round().astype("uint8")
    GeneratedVideo(prompt=call["prompt"], seed=0, report=pipe.acceleration.report(), frames=pixels, fps=16).save(out)
