"""OpenAI's client and `pipeboost serve`: make an image, watch one being made, edit a picture where the model can.

pipeboost serve &
python examples/openai_client.py --base-url http://127.0.0.1:8000/v1
"""

import argparse
import base64
from pathlib import Path

from openai import BadRequestError, OpenAI

PROMPT = "a big red star on the right over a sky background"


def main() -> None:
    """Ask a server for pictures, and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--output", type=Path, default=Path("served"))
    settings = parser.parse_args()
    settings.output.mkdir(parents=True, exist_ok=True)
    client = OpenAI(base_url=settings.base_url, api_key=settings.api_key)

    def save(name: str, text: str) -> Path:
        path = settings.output / name
        path.write_bytes(base64.b64decode(text))
        print(f"saved {path}")
        return path

    made = client.images.generate(prompt=settings.prompt, extra_body={"seed": 3})
    print(made.model_extra["pipeboost"])
    picture = save("image.png", made.data[0].b64_json)
    for event in client.images.generate(prompt=settings.prompt, stream=True, partial_images=2):
        last = event.type.endswith("completed")
        save("streamed.png" if last else f"partial_{event.partial_image_index}.png", event.b64_json)
    try:
        edited = client.images.edit(image=picture.open("rb"), prompt=settings.prompt)
        save("edited.png", edited.data[0].b64_json)
    except BadRequestError as error:  # a model that makes pictures from text alone
        print(error.body["message"])


if __name__ == "__main__":
    main()
