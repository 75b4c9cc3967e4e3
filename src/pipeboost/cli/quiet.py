"""What the libraries print while they load and run is not the command's answer: silence it, and put it back."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, libraries log errors only, and Diffusers and transformers show no bars of their own."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = logging.root.manager.disable
    bars = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        for library in bars:
            library.disable_progress_bar()
        try:
            yield
        finally:
            logging.disable(before)
            for library in bars:
                library.enable_progress_bar()
