"""Attention kernels: what a CPU can run, against attention written out in float64; the rest is in tests/gpu.

FlashAttention cannot run here. Its wrappers are tested with stand-ins that keep the packages' signatures (fa3-fwd
0.0.3, flash-attn 2.8) and compute what those promise; what the packages really do is tested on a GPU.
"""

import sys
import types

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask

from pipeboost.core.hardware import Hardware, detect_hardware
from pipeboost.kernels import flash, table
from pipeboost.kernels.flash import quantize_heads
from pipeboost.kernels.flex import key_padding_blocks
from pipeboost.kernels.key_padding import compact_keys, mask_kind
from pipeboost.kernels.table import (
    KERNELS,
    as_installed,
    available_kernels,
    installed_package,
    refuses,
    unavailable_reason,
)
from tests.floors import EPS

CPU = detect_hardware("cpu")
AMPERE = Hardware("cuda", "NVIDIA A100", (8, 0), 80 << 30, 1, False, True)
HOPPER = Hardware("cuda", "NVIDIA H100", (9, 0), 80 << 30, 1, False, True)
BLACKWELL = Hardware("cuda", "NVIDIA B200", (10, 0), 180 << 30, 1, False, True)
# FlexAttention says so on a CPU outside torch.compile; it is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
FLASH = ("flash2", "flash3", "flash3_fp8", "flash4")
POISON = 40.0
ROUNDING = 4 * 333**0.5 * EPS
"""Means of up to 333 values that reach 4: in float32 a sum rounds as often as it has terms, up or down at random."""


def reference(q, k, v, valid=None, bias=None, scale=None):
    """Attention and its log-sum-exp in float64; q, k, v are `(batch, tokens, heads, head_dim)`."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], -torch.inf)
    out = torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v
    return out.transpose(1, 2), torch.logsumexp(scores, dim=-1)


def tensors(queries, keys, *, batch=2, heads=3, head_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, heads, head_dim) for tokens in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def random_mask(keys, *, batch=2, seed=0):
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[:, keys // 2] = True
    return mask


def poisoned(k, v, valid):
    """Padding must not matter, so make it matter as much as it can."""
    return (torch.where(valid[:, :, None, None], x, POISON) for x in (k, v))


@pytest.mark.parametrize("name", ["sdpa", "flex"])
@pytest.mark.parametrize(("queries", "keys"), [(9, 7), (130, 77), (5, 260)])
@pytest.mark.parametrize("form", ["none", "batch x keys", "batch x 1 x 1 x keys"])
def test_kernel_is_masked_attention_with_its_log_sum_exp(name, queries, keys, form):
    q, k, v = tensors(queries, keys)
    valid = None if form == "none" else random_mask(keys)
    if valid is not None:
        k, v = poisoned(k, v, valid)
    mask = valid[:, None, None, :] if form.endswith("1 x keys") else valid
    expected, expected_lse = reference(q, k, v, valid)
    out, lse = KERNELS[name].function(q, k, v, mask, True)
    assert out.shape == q.shape
    assert lse.shape == (2, 3, queries)
    assert lse.dtype == torch.float32
    assert (out - expected).abs().max() < ROUNDING
    assert (lse - expected_lse).abs().max() < ROUNDING


@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_the_scale_is_used_and_the_log_sum_exp_is_optional(name):
    q, k, v = tensors(9, 7)
    valid = random_mask(7)
    expected, _ = reference(q, k, v, valid, scale=0.5)
    assert (KERNELS[name].function(q, k, v, valid, scale=0.5) - expected).abs().max() < ROUNDING


def test_sdpa_takes_additive_and_full_masks_and_returns_their_log_sum_exp():
    q, k, v = tensors(9, 7)
    for bias in (torch.randn(9, 7), torch.randn(2, 1, 9, 7), torch.randn(2, 3, 9, 7)):
        expected, expected_lse = reference(q, k, v, bias=bias)
        out, lse = KERNELS["sdpa"].function(q, k, v, bias, True)
        assert (out - expected).abs().max() < ROUNDING
        assert (lse - expected_lse).abs().max() < ROUNDING


@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_a_sample_without_any_real_key_gives_zeros(name):
    q, k, v = tensors(9, 7)
    valid = torch.zeros(2, 7, dtype=torch.bool)
    valid[1, 4] = True
    out, lse = KERNELS[name].function(q, k, v, valid, True)
    assert out[0].abs().max() == 0
    assert torch.equal(lse[0], torch.full_like(lse[0], -torch.inf))
    assert (out[1] - v[1, 4]).abs().max() < 8 * EPS  # the weight of the only key, 1, is a quotient of two sums


def test_mask_kind_tells_key_padding_from_masks_that_differ_between_queries():
    q, k, _ = tensors(9, 7)
    boolean = torch.ones(1, dtype=torch.bool)
    assert mask_kind(None, q, k) == "none"
    assert mask_kind(boolean.expand(2, 7), q, k) == "key padding"
    assert mask_kind(boolean.expand(2, 1, 1, 7), q, k) == "key padding"
    assert mask_kind(boolean.expand(1, 1, 1, 7), q, k) == "key padding"
    assert mask_kind(boolean.expand(9, 7), q, k) == "any"
    assert mask_kind(boolean.expand(2, 1, 9, 7), q, k) == "any"
    assert mask_kind(boolean.expand(2, 3, 1, 7), q, k) == "any"
    assert mask_kind(torch.zeros(2, 1, 1, 7), q, k) == "any"


def test_compacting_keeps_the_real_keys_in_order_and_counts_them():
    _, k, v = tensors(1, 7)
    valid = random_mask(7)
    packed_k, packed_v, lengths = compact_keys(k, v, valid[:, None, None, :])
    assert lengths.dtype == torch.int32
    for sample in range(2):
        assert torch.equal(packed_k[sample, : lengths[sample]], k[sample, valid[sample]])
        assert torch.equal(packed_v[sample, : lengths[sample]], v[sample, valid[sample]])


def test_compacting_right_padded_keys_moves_nothing():
    _, k, v = tensors(1, 7)
    valid = torch.arange(7)[None] < torch.tensor([[3], [7]])
    packed_k, packed_v, lengths = compact_keys(k, v, valid, right_padded=True)
    assert packed_k is k
    assert packed_v is v
    assert lengths.tolist() == [3, 7]


def flash_with_kvcache(
    q, k_cache, v_cache, *, cache_seqlens, softmax_scale, num_splits, return_softmax_lse,
    q_descale=None, k_descale=None, v_descale=None,
):  # fmt: skip
    """What FlashAttention promises; lengths must be int32, and a sample without keys has whatever log-sum-exp."""
    assert num_splits == 1
    assert return_softmax_lse
    assert cache_seqlens is None or cache_seqlens.dtype == torch.int32
    scaled = [
        x.float() if descale is None else x.float() * descale[:, None, :, None]
        for x, descale in ((q, q_descale), (k_cache, k_descale), (v_cache, v_descale))
    ]
    valid = None if cache_seqlens is None else torch.arange(k_cache.shape[1])[None] < cache_seqlens[:, None]
    out, lse = reference(*scaled, valid, scale=softmax_scale)
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    return out.to(dtype).contiguous(), lse.float().nan_to_num(neginf=torch.inf)


def flash_func(q, k, v, *, softmax_scale, return_attn_probs):
    assert return_attn_probs
    out, lse = reference(q, k, v, scale=softmax_scale)
    return out.to(q.dtype).contiguous(), lse.float(), None


def cute_func(q, k, v, softmax_scale=None, return_lse=False):
    out, lse, _ = flash_func(q, k, v, softmax_scale=softmax_scale, return_attn_probs=True)
    return out, lse if return_lse else None


def cute_varlen_func(q, k, v, seqused_k=None, softmax_scale=None, return_lse=False):
    out, lse = flash_with_kvcache(
        q, k, v, cache_seqlens=seqused_k, softmax_scale=softmax_scale, num_splits=1, return_softmax_lse=True
    )
    return out, lse if return_lse else None


@pytest.fixture
def flash_packages(monkeypatch):
    """Stand-ins for the FlashAttention packages."""
    contents = {
        "flash_attn": {"__path__": []},
        "flash_attn.flash_attn_interface": {
            "flash_attn_func": flash_func,
            "flash_attn_with_kvcache": flash_with_kvcache,
        },
        "flash_attn.cute": {"__path__": []},
        "flash_attn.cute.interface": {"flash_attn_func": cute_func, "flash_attn_varlen_func": cute_varlen_func},
        "fa3_fwd_interface": {"flash_attn_with_kvcache": flash_with_kvcache},
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    flash._flash3_interface.cache_clear()
    yield
    flash._flash3_interface.cache_clear()


@pytest.mark.usefixtures("flash_packages")
@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("masked", [False, True])
def test_flash_kernels_read_only_the_real_keys(name, masked):
    q, k, v = tensors(130, 77)
    valid = random_mask(77) if masked else None
    if valid is not None:
        k, v = poisoned(k, v, valid)
    expected, expected_lse = reference(q, k, v, valid)
    out, lse = KERNELS[name].function(q, k, v, valid, True)
    # Eight bits with one scale per head: 2 ** -4 relative at worst, some 3% on average.
    bound = 0.08 if name == "flash3_fp8" else ROUNDING
    assert (out - expected).norm() / expected.norm() < bound
    assert (lse - expected_lse).abs().max() < (0.2 if name == "flash3_fp8" else ROUNDING)
    assert out.dtype == q.dtype


@pytest.mark.usefixtures("flash_packages")
@pytest.mark.parametrize("name", FLASH)
def test_flash_kernels_give_minus_infinity_for_a_sample_without_keys(name):
    q, k, v = tensors(9, 7)
    valid = torch.zeros(2, 7, dtype=torch.bool)
    valid[1, 4] = True
    out, lse = KERNELS[name].function(q, k, v, valid, True)
    assert out[0].abs().max() == 0
    assert torch.equal(lse[0], torch.full_like(lse[0], -torch.inf))


@pytest.mark.usefixtures("flash_packages")
@pytest.mark.parametrize("name", ["sdpa", "flex", *FLASH])
def test_one_graph_serves_every_text_length(name):
    def attend(q, k, v, mask):
        return KERNELS[name].function(q, k, v, mask, True)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for keys in (200, 150, 333):
        q, k, v = tensors(24, keys)
        valid = random_mask(keys)
        mask = valid[:, None, None, :]
        for x, dim in ((k, 1), (v, 1), (mask, 3)):
            torch._dynamo.mark_dynamic(x, dim)
        out, lse = compiled(q, k, v, mask)
        expected, expected_lse = reference(q, k, v, valid)
        assert (out - expected).norm() / expected.norm() < (0.08 if name == "flash3_fp8" else ROUNDING)
        assert (lse - expected_lse).abs().max() < (0.2 if name == "flash3_fp8" else ROUNDING)
    assert counter.frame_count == 1


def test_fp8_scales_are_per_sample_and_head_and_ignore_padding():
    x = torch.randn(2, 50, 3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1.0, 30.0])[:, None]
    poisoned_x = x.clone()
    poisoned_x[1, 20:] = 1000.0
    quantised, descale = quantize_heads(poisoned_x, torch.tensor([50, 20], dtype=torch.int32))
    assert quantised.dtype == torch.float8_e4m3fn
    assert descale.shape == (2, 3)
    restored = quantised.float() * descale[:, None, :, None]
    # Half a step of a 3-bit mantissa, and of the subnormals below 2 ** -6 of full scale.
    tolerance = x.abs() / 16 + descale[:, None, :, None] * 2**-10
    assert ((restored - x).abs() <= tolerance)[0].all()
    assert ((restored - x).abs() <= tolerance)[1, :20].all()
    assert restored[1, 20:].abs().max() == 0


def test_the_lossy_kernels_are_of_the_tier_that_allows_them():
    lossy = {name for name, kernel in KERNELS.items() if kernel.tier == "balanced"}
    assert lossy == {"flash3_fp8", "sage"}


def test_a_cpu_has_torch_kernels_only():
    assert set(available_kernels(CPU)) == {"sdpa", "flex"}


def test_capabilities_are_checked_before_packages(monkeypatch):
    monkeypatch.setattr(table, "_is_installed", lambda module: True)
    everywhere = {"sdpa", "cudnn", "flash2", "sage", "flex"}
    assert set(available_kernels(AMPERE)) == everywhere
    assert set(available_kernels(HOPPER)) == everywhere | {"flash3", "flash3_fp8"}
    assert set(available_kernels(BLACKWELL)) == everywhere | {"flash4"}
    reason = unavailable_reason(KERNELS["flash4"], HOPPER)
    assert reason is not None
    assert "compute capability 10.0" in reason


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash3_fp8", "flash4", "sage"])
def test_a_missing_package_is_named_with_its_install_command(name, monkeypatch):
    monkeypatch.setattr(table, "_is_installed", lambda module: False)
    reason = unavailable_reason(KERNELS[name], BLACKWELL if name == "flash4" else HOPPER)
    assert reason is not None
    assert "pip install" in reason
    assert repr(name) in reason


def test_looking_for_a_package_imports_nothing_of_it(tmp_path, monkeypatch):
    package = tmp_path / "flash_attn"
    (package / "cute").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "cute" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_package(KERNELS["flash4"]) is KERNELS["flash4"].packages[0]
    assert installed_package(KERNELS["flash2"]) is None
    assert "flash_attn" not in sys.modules


def test_fa3_fwd_computes_in_bfloat16_only_and_the_full_build_in_half_too(monkeypatch):
    kernel = KERNELS["flash3"]
    call = {"device": "cuda", "head_dim": 128, "mask": "none"}
    monkeypatch.setattr(table, "_is_installed", lambda module: module == "fa3_fwd_interface")
    assert as_installed(kernel).dtypes == (torch.bfloat16,)
    assert refuses(as_installed(kernel), dtype=torch.bfloat16, **call) is None
    assert refuses(as_installed(kernel), dtype=torch.float16, **call) == "it does not compute in this dtype"
    monkeypatch.setattr(table, "_is_installed", lambda module: True)
    assert refuses(as_installed(kernel), dtype=torch.float16, **call) is None


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.masks != "any"])
def test_only_torch_kernels_take_masks_that_differ_between_queries(name):
    kernel = KERNELS[name]
    call = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 128}
    assert refuses(kernel, mask="key padding", **call) is None
    assert refuses(kernel, mask="any", **call) == "it does not honour this mask"
    assert refuses(kernel, mask="none", **{**call, "head_dim": 100_000}) == "it does not have this head dimension"
    assert refuses(kernel, mask="none", **{**call, "device": "xpu"}) == "it does not run on this device"


def test_flex_block_masks_equal_those_that_torch_would_derive():
    valid = torch.rand(3, 700, generator=torch.Generator().manual_seed(0)) < 0.1
    valid[0, 128:300] = False
    valid[1] = False
    ours = key_padding_blocks(valid, 500)
    derived = BlockMask.from_kv_blocks(
        ours.kv_num_blocks, ours.kv_indices, BLOCK_SIZE=128, mask_mod=ours.mask_mod, seq_lengths=(500, 700)
    )
    assert torch.equal(ours.to_dense(), derived.to_dense())
    assert torch.equal(ours.q_num_blocks, derived.q_num_blocks)
    for sample, key_block in zip(*torch.nonzero(ours.q_num_blocks[:, 0], as_tuple=True), strict=True):
        count = ours.q_num_blocks[sample, 0, key_block]
        assert torch.equal(
            ours.q_indices[sample, 0, key_block, :count], derived.q_indices[sample, 0, key_block, :count]
        )
