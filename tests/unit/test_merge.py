"""Two partial attentions as one, and the kernel that does it on a GPU, run by `test_rewrites.py` in an interpreter."""

import pytest
import torch

from pipeboost.kernels.merge import merge_partial
from tests.floors import EPS


def parts(batch: int, tokens: int, heads: int, head_dim: int, keys: int, masked: bool) -> tuple[torch.Tensor, ...]:
    """A mask, and what attention to each half of the keys gives: out, lse, out, lse; and to all of them."""
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(batch, heads, length, head_dim) for length in (tokens, keys, keys))
    scores = q @ k.transpose(-1, -2)
    if masked:
        scores[:, :, ::2, : keys // 2] = float("-inf")
        scores[:, :, ::3, keys // 2 :] = float("-inf")
    found = []
    for part in (slice(0, keys // 2), slice(keys // 2, keys), slice(0, keys)):
        lse = torch.logsumexp(scores[..., part], dim=-1)
        out = (torch.softmax(scores[..., part], dim=-1) @ v[..., part, :]).transpose(1, 2).contiguous()
        found += [out, lse]
    return tuple(found)


@pytest.mark.parametrize("masked", [False, True])
def test_two_halves_give_the_whole_and_a_masked_half_may_be_anything(masked):
    out, lse, part, part_lse, whole, whole_lse = parts(2, 7, 3, 5, 10, masked)
    merged, merged_lse = merge_partial(out, lse, part, part_lse)
    seen = (whole_lse > float("-inf")).transpose(1, 2).unsqueeze(-1)
    assert (merged - whole).where(seen, torch.zeros(())).abs().max() < 4 * 10 * EPS  # ten terms that reach 4
    assert torch.equal(merged.where(~seen, torch.zeros(())), torch.zeros_like(merged))
    torch.testing.assert_close(merged_lse, whole_lse)


def compare_kernel() -> None:
    """Kernel against reference: odd sizes, masked halves full of NaN, parts in 16 bits."""
    from pipeboost.kernels.merge_triton import merge_in_place

    for shape in ((1, 1, 1, 8), (2, 7, 3, 12), (1, 33, 2, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            out, lse, part, part_lse, *_ = parts(*shape, 10, True)
            assert lse.isinf().any()
            part = part.to(dtype)
            expected, expected_lse = merge_partial(out, lse, part, part_lse)
            merge_in_place(out, lse, part, part_lse)
            torch.testing.assert_close(out, expected, rtol=16 * EPS, atol=16 * EPS)
            torch.testing.assert_close(lse, expected_lse)
            assert not out.isnan().any()
