"""Stages of your own: a prompt rewriter, a latent filter and a watermark, each put into a stock pipeline's call.

python -m examples.stages --out pictures      # with the demo model, on any machine
"""

import argparse
from pathlib import Path

import torch

from pipeboost import Checks, Stage, accelerate_pipeline


class PromptRewriter(Stage):
    """Before text encoding: `values` are the arguments of `encode_prompt`, through which negative prompts go too."""

    def __init__(self, ending: str) -> None:
        self.ending = ending

    def run(self, values):
        prompts = values["prompt"]
        if prompts == self.arguments.get("negative_prompt"):
            return values
        rewritten = [prompt + self.ending for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        return values | {"prompt": rewritten[0] if isinstance(prompts, str) else rewritten}


class LatentFilter(Stage):
    """Between denoising and decoding: `values` holds the last step's latents."""

    def verify_input(self, values):
        checks = Checks(values)
        checks.no_nan("latents")
        return checks.failed

    def run(self, values):
        return {"latents": values["latents"].clamp(-3, 3)}


class Watermark(Stage):
    """After decoding: `values` holds the decoded pixels, `(batch, channels, ..., height, width)` from -1 to 1."""

    def run(self, values):
        pixels = values["sample"].clone()
        pixels[..., -8:, -8:] = torch.where(torch.eye(8, dtype=torch.bool, device=pixels.device), 1.0, -1.0)
        return values | {"sample": pixels}


def main() -> None:
    """The same prompt without and with the three stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)

    from diffusers import FluxPipeline

    from examples.demo_model.prompts import DEMO_CALL, WEIGHTS

    pipe = accelerate_pipeline(FluxPipeline.from_pretrained(str(WEIGHTS)))
    call = {"prompt": "a red star in the centre", **DEMO_CALL}
    pipe(**call, generator=torch.Generator().manual_seed(0)).images[0].save(folder / "stock.png")
    pipe.acceleration.add_stage("mint", PromptRewriter(" on a mint background"), before="text encoding")
    pipe.acceleration.add_stage("clamp", LatentFilter(), after="denoising")
    pipe.acceleration.add_stage("watermark", Watermark(), after="decoding")
    pipe(**call, generator=torch.Generator().manual_seed(0)).images[0].save(folder / "with_stages.png")
    print(pipe.acceleration.stages)
    print(pipe.acceleration.report())


if __name__ == "__main__":
    main()
