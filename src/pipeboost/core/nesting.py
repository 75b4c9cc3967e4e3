"""How middleware nests: for each kind of object, the names of all middleware on its methods from the outside in.

This is the only place that knows. A place is written `"kind.name"`, such as `"block.cache"`.
"""

from __future__ import annotations

NESTING: dict[str, dict[str, str]] = {
    "pipe": {
        "call": "opens the call, in which everything below acts",
        "stages": "a stage spans whatever else its method has become",
        "reuse": "a prompt that was kept is a stage that took no time",
        "parallel": "stops what ranks cannot do while they share weights; shares the `interrupt` flag; shows one bar",
        "offload": "answers where the script is to run",
        "quantize": "weights are as they were before the pipeline puts hooks on them or writes to them",
    },
    "component": {
        "writes": "notes that weights are about to change, and has them as they were before anything reads them",
        "guard": "refuses a call that only some ranks make, before anything of it is timed or loaded",
        "rewrite": "what the user has compiled is stock again before it runs",
        "quantize": "a forward has the weights of its call before they are loaded or captured",
        "stages": "a stage's time includes loading its weights",
        "tune": "records what the script is given",
        "offload": "weights are there before anything computes",
        "cfg": "the branch that another rank computes is neither trimmed nor captured here",
        "cache": "an output that is extrapolated is that of one guidance branch, and computes nothing below",
        "verify": "sees each branch as it was computed, whatever computes it",
        "strips": "ranks divide a VAE's map",
        "padding": "padded text is cut before ranks share its tokens, and before shapes are captured",
        "sequence": "a rank's own tokens are what a graph captures",
        "graphs": "a replay runs no Python: all that decides on the host is outside",
        "sizes": "knows of which sizes compiled code is at hand",
        "compile": "what a graph captures may be compiled as a whole",
    },
    "block": {
        "sequence": "the cache sees states of a rank's own tokens, as the block does",
        "cache": "a block that is skipped computes nothing below",
        "verify": "sees the inputs that stock gives a block, whatever computes it",
        "padding": "drops the mask of text without padding",
        "offload": "weights of a block come while the one before it computes",
        "compile": "what is compiled is the block as stock has it",
    },
    "submodule": {
        "sequence": "puts tokens together, or takes a rank's own",
        "rewrite": "computes what stock would, inside its hooks",
    },
    "scheduler": {
        "tune": "records what the step was given and what it returned",
        "agreement": "whether the other ranks still run is asked before their branches are",
        "cfg": "fills in the branches of other ranks, which the step reads",
        "stages": "counts the step once it has all it reads",
    },
}


def order_of(place: str) -> int:
    """Return how far inside a place is, among those of its kind of object."""
    kind, _, name = place.partition(".")
    assert name in NESTING.get(kind, {}), f"no place {place!r} in the nesting table"
    return list(NESTING[kind]).index(name)
