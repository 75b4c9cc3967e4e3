"""How ranks can share a model: what a `Family` says of its tokens, its guidance branches, its weights and its VAE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TokenArgument:
    """A tensor with an entry for each token, or a tuple or list of such tensors.

    Attributes:
        name: the argument; `"image_rotary_emb.1"` means the second tensor of that tuple.
        dim: the dimension that counts the tokens.
        tokens: whose: the image's, the text's, or both in this order.
        ndim: dimensions it has where there is an entry for each token; None: there always is.
    """

    name: str
    dim: int
    tokens: Literal["image", "text", "text_image", "image_text"]
    ndim: int | None = None


@dataclass(frozen=True)
class TokenSharding:
    """What of a transformer's forward has an entry for each token, so that ranks can share the tokens.

    Everything between the first block and `gathered` works on a rank's own tokens, and is right for any of them.

    Attributes:
        streams: arguments of the first block; the blocks hand them on.
        constants: arguments that every block gets anew; a block has some of them.
        leading: integer arguments of the blocks that count tokens at the front of the image.
        forward: arguments of the transformer that are added to the states between blocks.
        outputs: submodule → what it returns, `name` being the number in a tuple.
        gathered: submodule whose output, `(batch, image tokens, width)`, is put together again.
        text_on_every_rank: whether a rank without any text token goes wrong.
    """

    streams: tuple[TokenArgument, ...]
    constants: tuple[TokenArgument, ...]
    leading: tuple[str, ...] = ()
    forward: tuple[TokenArgument, ...] = ()
    outputs: Mapping[str, tuple[TokenArgument, ...]] = field(default_factory=dict)
    gathered: str = "proj_out"
    text_on_every_rank: bool = False


@dataclass(frozen=True)
class BatchedBranches:
    """A transformer that gets all guidance branches of a step as one batch, whose samples know nothing of each other.

    Attributes:
        samples: forward arguments with an entry for each sample: a list of them, or a tensor along its first dimension.
            What the forward returns has the same entries, those of one shape if the entries of the first argument are.
    """

    samples: tuple[str, ...]


@dataclass(frozen=True)
class SplitLayers:
    """Layers of one module that ranks split between them, all or none: each rank has some heads, or a part of a width.

    Paths are relative to `path`. What a variant of the model does not have is passed over.

    Attributes:
        path: the module, `*` for any index; such as `"transformer_blocks.*.attn"`.
        columns: linears of whose outputs each rank computes a part.
        rows: linears that take such a part; the ranks' products are summed, and the bias added once.
        packed_rows: rows that take the outputs of several `columns` side by side → those columns, in that order.
        gathered: linears and embeddings of whose outputs each rank computes a part, and all then get the whole.
        norms: RMS norms over all heads at once.
        head_biases: embeddings with one output for each head.
        counts: attributes that count the heads or the width of all heads, and must tell this rank's.
        head_width: attribute with the width of one head, for a module that derives its heads from it.
    """

    path: str
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    packed_rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gathered: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    head_biases: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    head_width: str = ""


@dataclass(frozen=True)
class TensorSharding:
    """How the weights of a model are split between the ranks of tensor parallelism; what is not named stays whole.

    Attributes:
        layers: the layers that are split, each group on its own.
    """

    layers: tuple[SplitLayers, ...]


@dataclass(frozen=True)
class Compiling:
    """What torch.compile of a VAE's decoder costs and saves, as measured.

    Attributes:
        seconds: to compile it, with nothing at hand from before.
        saved: seconds, for each picture of `workload`.
        workload: the size.
        hardware: the device's name.
    """

    seconds: float
    saved: float
    workload: str
    hardware: str

    @property
    def pays_after(self) -> int:
        """Pictures after which it has saved what it cost."""
        return math.ceil(self.seconds / self.saved)


@dataclass(frozen=True)
class Autoencoder:
    """What the encoder and the decoder of a VAE are made of besides torch's own modules, so that ranks can share it.

    Attributes:
        local: class names of modules that do the same to every pixel and look at no other, but through modules inside
            them; and of convolutions and nearest upsampling that prepare their input. `parallel/vae.py` says
            how they may pad it.
        attention: class names of modules that attend to the whole map by torch's scaled dot product attention, with
            that of the processor that does so, or `""`. Their tokens are in the order (frames, rows, columns), and
            their mask depends on the two frames alone.
        activated: class name of a module → its norms whose output goes to its `nonlinearity` and nowhere else.
        compiling: what compiling its decoder costs and saves; None where that was not measured.
    """

    local: tuple[str, ...]
    attention: tuple[tuple[str, str], ...] = ()
    activated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    compiling: Compiling | None = None
