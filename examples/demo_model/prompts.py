"""The prompts to call the model with: four for show, 200 to score it by; none of their scenes was in training."""

import random
from pathlib import Path

from .captions import Prompt, parse_caption, write_caption
from .scenes import PIXELS, is_held_out, sample_scene

WEIGHTS = Path(__file__).parent / "weights"
DEMO_CALL = {"height": PIXELS, "width": PIXELS, "num_inference_steps": 28, "max_sequence_length": 64}
DEMO_PROMPTS = tuple(
    Prompt(text, parse_caption(text))
    for text in (
        "a large red circle on the left, a large blue square in the centre and a large yellow triangle on the right "
        "on a cream background",
        "a large yellow moon in the top left corner, a small blue star in the centre and a small orange star "
        "on the right, lavender background",
        "a large purple ring in the centre and a small pink heart in the top left corner on a mint background",
        "a big red star on the right over a sky background",
    )
)


def held_out_scenes(n: int = 200) -> list[Prompt]:
    """The first `n` of a fixed list of distinct captions, places always named, whose scenes training never drew."""
    rng = random.Random("held-out captions")
    prompts: dict[str, Prompt] = {}
    while len(prompts) < n:
        prompt = write_caption(sample_scene(rng, held_out=True), rng)
        if prompt.scene.things[0].place is not None:
            prompts.setdefault(prompt.text, prompt)
    assert all(is_held_out(prompt.scene) for prompt in prompts.values())
    return list(prompts.values())
