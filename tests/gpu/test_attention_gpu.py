"""Every attention kernel that is installed here, against attention in float64: masks, odd sizes, batches, compiled.

Errors are relative, `|ours - reference| / |reference|` in the Frobenius norm, on unit-normal inputs. 16-bit kernels get
1%: bfloat16 rounds to 2 ** -9, once for the weights and once for the output. int8 queries and keys get 4%. fp8 gets 8%:
3 mantissa bits round by 2.3% on average, and queries, keys, values and weights are all rounded.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from pipeboost.core.hardware import detect_hardware, has_cuda
from pipeboost.kernels.key_padding import compact_keys
from pipeboost.kernels.table import KERNELS, as_installed, available_kernels, unavailable_reason

pytestmark = pytest.mark.gpu
BOUNDS = {"flash3_fp8": 0.08, "sage": 0.04}
# Absolute, the worst of all queries; with few keys nothing averages out.
LSE_BOUNDS = {"flash3_fp8": 0.3, "sage": 0.1}
SIZES = ((1000, 77), (1000, 1000), (77, 1000), (4097, 4097), (128, 1))
KERNEL_NAMES = tuple(KERNELS)
# Every new shape costs FlexAttention seconds of compiling.
CASES = [(name, *sizes) for name in KERNEL_NAMES for sizes in (SIZES[::3] if name == "flex" else SIZES)]
POISON = 30.0


def needs(name):
    reason = unavailable_reason(KERNELS[name], detect_hardware("cuda" if has_cuda() else "cpu"))
    if reason is not None:
        pytest.skip(reason)


def tensors(queries, keys, *, head_dim=128, batch=2, heads=4, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(batch, tokens, heads, head_dim) for tokens in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


def random_mask(keys, *, batch=2, seed=0):
    mask = torch.rand(batch, keys, generator=torch.Generator("cuda").manual_seed(seed), device="cuda") > 0.4
    mask[:, keys // 2] = True
    return mask


def reference(q, k, v, valid=None, bias=None, scale=None):
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], -torch.inf)
    out = torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v
    return out.transpose(1, 2), torch.logsumexp(scores, dim=-1)


def assert_close(name, out, lse, expected, expected_lse, dtype=torch.bfloat16):
    assert out.shape == expected.shape
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    error = ((out - expected).norm() / expected.norm()).item()
    bound = BOUNDS.get(name, 1e-5 if dtype == torch.float32 else 0.01)
    assert error < bound, f"{name}: relative error {error:.2e}, bound {bound}"
    if lse is not None:
        assert lse.dtype == torch.float32
        assert lse.shape == (out.shape[0], out.shape[2], out.shape[1])
        error = (lse - expected_lse).abs().max().item()
        bound = LSE_BOUNDS.get(name, 1e-4 if dtype == torch.float32 else 0.02)
        assert error < bound, f"{name}: log-sum-exp off by {error:.2e}, bound {bound}"


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("name", "queries", "keys"), CASES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_kernel_is_attention(name, queries, keys, head_dim, masked):
    needs(name)
    q, k, v = tensors(queries, keys, head_dim=head_dim)
    valid = random_mask(keys) if masked else None
    mask = None
    if valid is not None:
        k, v = (torch.where(valid[:, :, None, None], x, POISON) for x in (k, v))
        mask = valid[:, None, None, :]
    originals = [x.clone() for x in (q, k, v)]
    expected, expected_lse = reference(q, k, v, valid)
    out, lse = KERNELS[name].function(q, k, v, mask, True)
    assert_close(name, out, lse, expected, expected_lse)
    if name != "flex":
        assert_close(name, KERNELS[name].function(q, k, v, mask), None, expected, expected_lse)
    assert all(torch.equal(x, original) for x, original in zip((q, k, v), originals, strict=True))


@pytest.mark.parametrize("name", KERNEL_NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernel_computes_in_the_dtypes_it_names(name, dtype):
    needs(name)
    if dtype not in as_installed(KERNELS[name]).dtypes:
        pytest.skip(f"{name} does not compute in {dtype} here, and says so")
    q, k, v = tensors(333, 500, dtype=dtype)
    valid = random_mask(500)
    out, lse = KERNELS[name].function(q, k, v, valid, True)
    assert_close(name, out, lse, *reference(q, k, v, valid), dtype=dtype)


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_a_scale_and_inputs_that_are_not_contiguous(name):
    needs(name)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(300, 200))
    assert not q.is_contiguous()
    out, lse = KERNELS[name].function(q, k, v, None, True, scale=0.05)
    assert_close(name, out, lse, *reference(q, k, v, scale=0.05))


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_a_sample_without_any_real_key_gives_zeros(name):
    needs(name)
    q, k, v = tensors(300, 200)
    valid = random_mask(200)
    valid[0] = False
    out, lse = KERNELS[name].function(q, k, v, valid, True)
    assert out[0].abs().max() == 0
    assert torch.equal(lse[0], torch.full_like(lse[0], -torch.inf))
    expected, expected_lse = reference(q[1:], k[1:], v[1:], valid[1:])
    assert_close(name, out[1:], lse[1:], expected, expected_lse)


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.masks == "any"])
def test_additive_and_full_masks(name):
    needs(name)
    q, k, v = tensors(300, 200)
    bias = torch.randn(1, 1, 300, 200, device="cuda").bfloat16()
    out, lse = KERNELS[name].function(q, k, v, bias, True)
    assert_close(name, out, lse, *reference(q, k, v, bias=bias))


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.masks == "key padding"])
def test_right_padded_masks_need_no_gather(name):
    needs(name)
    q, k, v = tensors(300, 200)
    valid = torch.arange(200, device="cuda")[None] < torch.tensor([[150], [3]], device="cuda")
    out, lse = KERNELS[name].function(q, k, v, valid, True, right_padded=True)
    assert_close(name, out, lse, *reference(q, k, v, valid))


@pytest.mark.parametrize("name", KERNEL_NAMES)
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_whole_with_a_text_length_that_varies(name, masked):
    needs(name)

    def attend(q, k, v, mask):
        out, lse = KERNELS[name].function(q * 1.0, k, v, mask, True)
        return out * 1.0, lse + 0.0

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(attend, fullgraph=True)
    for keys in (1300, 1077, 1555):
        q, k, v = tensors(1000, keys)
        valid = random_mask(keys) if masked else None
        mask = None if valid is None else valid[:, None, None, :]
        for x, dim in ((k, 1), (v, 1), *(((mask, 3),) if mask is not None else ())):
            torch._dynamo.mark_dynamic(x, dim)
        out, lse = compiled(q, k, v, mask)
        assert_close(name, out, lse, *reference(q, k, v, valid))
    # Under a mask flex runs a compiled copy of its own, with one graph for the first key count and one for all others.
    assert counters["stats"]["unique_graphs"] == (3 if name == "flex" and masked else 1)


@pytest.mark.parametrize("name", [name for name in KERNEL_NAMES if name != "sage"])
@pytest.mark.parametrize("masked", [False, True])
def test_replays_from_a_cuda_graph(name, masked):
    """No kernel waits for the device: capturing one that does fails. (SageAttention 2.x does under a mask.)"""
    needs(name)
    q, k, v = tensors(500, 300)
    valid = random_mask(300) if masked else None
    mask = None if valid is None else valid[:, None, None, :]
    function = torch.compile(KERNELS[name].function) if name == "flex" else KERNELS[name].function
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(q, k, v, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(q, k, v, mask)
    other = tensors(500, 300, seed=1)
    for x, new in zip((q, k, v), other, strict=True):
        x.copy_(new)
    if valid is not None and mask is not None:
        valid.copy_(random_mask(300, seed=1))
    graph.replay()
    torch.cuda.synchronize()
    expected, expected_lse = reference(q, k, v, valid)
    assert_close(name, out, None, expected, expected_lse)


def test_auto_and_stock_agree_on_a_transformer_in_bfloat16():
    from diffusers import FluxTransformer2DModel

    from pipeboost.contract.call import open_call
    from pipeboost.core.ledger import Ledger
    from pipeboost.features.attention.swap import swap_attention

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64,
    )  # fmt: skip
    model = model.to("cuda", torch.bfloat16)
    inputs = {
        "hidden_states": torch.randn(1, 9000, 64, device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 77, 64, device="cuda", dtype=torch.bfloat16),
        "pooled_projections": torch.randn(1, 64, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.tensor([0.5], device="cuda", dtype=torch.bfloat16),
        "img_ids": torch.randn(9000, 3, device="cuda"),
        "txt_ids": torch.zeros(77, 3, device="cuda"),
    }
    expected = model(**inputs)[0].float()
    for choice, bound in (("sdpa", 0.0), ("auto", 0.02)):
        with Ledger() as ledger:
            swap_attention(model, choice, ledger)
            with open_call(None, owner=None):
                out = model(**inputs)[0].float()
            ledger.undo()
        assert (out - expected).norm() / expected.norm() <= bound


def test_lengths_are_counted_on_the_device():
    _, k, v = tensors(1, 300)
    mask = random_mask(300)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compact_keys(k, v, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_kernels_of_this_machine_are_listed():
    """Printed with `-rA`, so that a run says what it covered."""
    available = available_kernels(detect_hardware("cuda"))
    print("available:", ", ".join(sorted(available)))
    assert {"sdpa", "cudnn", "flex"} <= set(available)
