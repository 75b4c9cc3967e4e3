"""Which attention kernel "auto" takes on which hardware, and what is refused before anything changes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from pipeboost.core.config import AttentionConfig
from pipeboost.core.errors import ConfigurationError, MissingPackageError, UnsupportedError
from pipeboost.core.hardware import Hardware, detect_hardware
from pipeboost.features.attention.choice import check_choice, choose_kernel, explain_choice
from pipeboost.kernels import table
from pipeboost.kernels.table import KERNELS

CPU = detect_hardware("cpu")
AMPERE = Hardware("cuda", "NVIDIA A100", (8, 0), 80 << 30, 1, False, True)
HOPPER = Hardware("cuda", "NVIDIA H100", (9, 0), 80 << 30, 1, False, True)
BLACKWELL = Hardware("cuda", "NVIDIA B200", (10, 0), 180 << 30, 1, False, True)
SMALL_TOKENS, FLUX_TOKENS, WAN_TOKENS, TEXT_TOKENS = 1536, 4608, 32760, 512


def everything(hardware):
    return {name: kernel for name, kernel in KERNELS.items() if table.wrong_hardware(kernel, hardware) is None}


def choose(queries, keys, hardware, *, mask="none", tier="lossless", dtype=torch.bfloat16, head_dim=128):
    """With every package installed."""
    return choose_kernel(queries, keys, head_dim, dtype, mask, hardware, tier, everything(hardware)).kernel.name


def test_auto_takes_flash3_on_hopper_where_tokens_are_many():
    assert choose(WAN_TOKENS, WAN_TOKENS, HOPPER) == "flash3"
    assert choose(FLUX_TOKENS, FLUX_TOKENS, HOPPER) == "flash3"
    assert choose(SMALL_TOKENS, SMALL_TOKENS, HOPPER) == "sdpa"


def test_auto_leaves_cross_attention_with_few_keys_to_torch():
    assert choose(WAN_TOKENS, TEXT_TOKENS, HOPPER) == "sdpa"
    assert choose(TEXT_TOKENS, WAN_TOKENS, HOPPER) == "sdpa"


def test_auto_takes_eight_bits_only_where_the_tier_allows_it():
    assert choose(WAN_TOKENS, WAN_TOKENS, HOPPER, tier="balanced") == "flash3_fp8"
    assert choose(WAN_TOKENS, WAN_TOKENS, HOPPER, tier="fast") == "flash3_fp8"
    assert choose(FLUX_TOKENS, FLUX_TOKENS, HOPPER, tier="balanced") == "flash3"
    assert choose(SMALL_TOKENS, SMALL_TOKENS, HOPPER, tier="balanced") == "sdpa"


def test_auto_keeps_a_fast_kernel_under_key_padding():
    assert choose(WAN_TOKENS, WAN_TOKENS, HOPPER, mask="key padding") == "flash3"
    assert choose(WAN_TOKENS, WAN_TOKENS, AMPERE, mask="key padding") == "flash2"
    assert choose(WAN_TOKENS, WAN_TOKENS, AMPERE) == "sdpa"
    assert choose(WAN_TOKENS, WAN_TOKENS, HOPPER, mask="any") == "sdpa"


def test_auto_never_takes_a_kernel_that_would_refuse_the_call():
    assert choose(WAN_TOKENS, WAN_TOKENS, HOPPER, dtype=torch.float32) == "sdpa"
    assert choose(WAN_TOKENS, WAN_TOKENS, HOPPER, head_dim=512) == "sdpa"
    assert choose(WAN_TOKENS, WAN_TOKENS, BLACKWELL) == "flash4"
    assert choose(WAN_TOKENS, WAN_TOKENS, CPU) == "sdpa"


def test_auto_takes_nothing_that_is_not_installed():
    installed = {"sdpa": KERNELS["sdpa"]}
    choice = choose_kernel(WAN_TOKENS, WAN_TOKENS, 128, torch.bfloat16, "none", HOPPER, "lossless", installed)
    assert choice.kernel.name == "sdpa"
    assert dict(choice.considered)["flash3"] == "it is not installed, or not for this device"


def test_the_choice_is_traced_without_a_graph_per_token_count():
    installed = everything(HOPPER)

    def tokens_by_choice(x):
        choice = choose_kernel(x.shape[0], 9000, 128, torch.bfloat16, "key padding", HOPPER, "balanced", installed)
        return x + len(choice.kernel.name)

    counter = CompileCounter()
    compiled = torch.compile(tokens_by_choice, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (1536, 4608, 5000, 8191, 8192, 9000, 4609, 2000):
        name = choose(tokens, 9000, HOPPER, mask="key padding", tier="balanced")
        assert compiled(torch.zeros(tokens)).unique().item() == len(name)
    assert counter.frame_count == 3


def test_the_plan_names_both_choices_and_what_spoke_against_the_others(monkeypatch):
    monkeypatch.setattr(table, "_is_installed", lambda module: module == "fa3_fwd_interface")
    choice, why, considered = explain_choice(AttentionConfig(), hardware=HOPPER, tier="lossless", dtype=torch.bfloat16)
    assert choice == "flash3 from 4096 tokens, else sdpa"
    assert "flash3 is the fastest" in why
    assert any("flash4" in line and "compute capability 10.0" in line for line in considered)
    assert any("flash3_fp8" in line and "tier" in line for line in considered)
    balanced = explain_choice(AttentionConfig(), hardware=HOPPER, tier="balanced", dtype=torch.bfloat16)
    assert balanced[0] == "flash3_fp8 from 8192 tokens, flash3 from 4096 tokens, else sdpa"
    monkeypatch.setattr(table, "_is_installed", lambda module: False)
    choice, _, considered = explain_choice(AttentionConfig(), hardware=HOPPER, tier="lossless", dtype=torch.bfloat16)
    assert choice == "sdpa"
    assert any("pip install fa3-fwd" in line for line in considered)
    assert explain_choice(AttentionConfig("flex"), hardware=CPU, tier="lossless", dtype=torch.float32)[0] == "flex"


def test_a_named_kernel_is_refused_before_any_change(monkeypatch):
    with pytest.raises(ConfigurationError, match="quality='balanced'"):
        check_choice("sage", tier="lossless", hardware=HOPPER)
    with pytest.raises(ConfigurationError, match="'sdpa', 'cudnn'"):
        check_choice("xformers", tier="lossless", hardware=HOPPER)
    with pytest.raises(UnsupportedError, match=r"compute capability 10\.0 or more"):
        check_choice("flash4", tier="lossless", hardware=HOPPER)
    with pytest.raises(UnsupportedError, match="cuda only"):
        check_choice("flash3", tier="lossless", hardware=CPU)
    monkeypatch.setattr(table, "_is_installed", lambda module: False)
    with pytest.raises(MissingPackageError, match="pip install fa3-fwd"):
        check_choice("flash3", tier="lossless", hardware=HOPPER)
    monkeypatch.setattr(table, "_is_installed", lambda module: True)
    with pytest.raises(UnsupportedError, match="dtype"):
        check_choice("flash3", tier="lossless", hardware=HOPPER, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="head dimension 512"):
        check_choice("flash3", tier="lossless", hardware=HOPPER, dtype=torch.bfloat16, head_dim=512)
    check_choice("flash3", tier="lossless", hardware=HOPPER, dtype=torch.bfloat16, head_dim=128)
