"""Meters and FLOP counts against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from outlay.core.budget import Budget
from outlay.core.meter import FlopCounter, FlopTable, Meter


def test_linear_forward_and_backward():
    layer, x = nn.Linear(16, 24), torch.randn(10, 16, requires_grad=True)
    with FlopCounter() as counter:
        layer(x).sum().backward()
    assert counter.total == 3 * 2 * 10 * 16 * 24


def attention(heads, groups, backward=True, causal=False):
    q = torch.randn(2, heads, 32, 8, requires_grad=backward)
    k, v = (torch.randn(2, groups, 32, 8, requires_grad=backward) for _ in range(2))
    with FlopCounter() as counter:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != groups)
        forward = counter.total
        if backward:
            out.sum().backward()
    return forward, counter.total


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_attention_on_cpu(heads, groups, causal):
    """Two matrix products forward, four backward: what a kernel makes again is no other work."""
    product = 2 * 2 * heads * 32 * 32 * 8
    forward, whole = attention(heads, groups, causal=causal)
    assert forward == pytest.approx(2 * product, rel=0.01)
    assert whole == pytest.approx(6 * product, rel=0.01)
    assert attention(heads, groups, backward=False)[0] == pytest.approx(2 * product, rel=0.01)


def test_attention_costs_the_same_whichever_kernel_runs():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        plain = attention(4, 4)
    assert attention(4, 4) == plain


def test_attention_with_a_mask():
    q = torch.randn(2, 4, 32, 8)
    mask = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    with FlopCounter() as counter:
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert counter.total == pytest.approx(2 * 2 * 2 * 4 * 32 * 32 * 8, rel=0.01)


@pytest.mark.parametrize("groups", [4, 2])
def test_a_small_language_model(groups):
    from transformers import AutoModelForCausalLM, LlamaConfig

    width, inner, vocabulary, layers, tokens, batch = 32, 64, 50, 2, 16, 3
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=groups,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    ids = torch.randint(0, vocabulary, (batch, tokens))
    with FlopCounter() as counter:
        model(input_ids=ids).logits.sum().backward()
    side = width * groups // 4
    weights = layers * (2 * width * width + 2 * width * side + 3 * width * inner)
    linear = 3 * 2 * batch * tokens * (weights + width * vocabulary)
    scores = layers * 6 * 2 * batch * 4 * tokens * tokens * (width // 4)
    assert counter.total == pytest.approx(linear + scores, rel=0.01)


def test_shapes_are_counted_once_and_names_are_looked_up():
    meter, table, layer = Meter(), FlopTable(), nn.Linear(4, 4, bias=False)

    def work():
        with torch.no_grad(), meter.under("teacher"):
            layer(torch.ones(2, 4))
        return layer(torch.ones(2, 4))

    for times in (1, 2, 3):
        _, flops = table.run("shape", work, meter)
        assert flops == (64, 64, 64) and meter.charges["teacher"]["flops"] == 64 * times
    assert len(table.known) == 1 and meter.totals["flops"] == 192


def test_work_beside_the_step_is_counted_on_the_spot():
    meter, layer = Meter(), nn.Linear(4, 4, bias=False)
    with meter.under("scoring"):
        layer(torch.ones(2, 4))
    assert meter.charges["scoring"]["flops"] == 64 == meter.totals["flops"]
    assert meter.charges["scoring"]["seconds"] == meter.totals["seconds"] > 0
    meter.clocked = True
    before = meter.totals["seconds"]
    with meter.under("scoring"):
        layer(torch.ones(2, 4))
    assert meter.totals["seconds"] == before, "the step's own seconds hold it already"


def test_totals_charges_and_shares():
    meter = Meter()
    meter.add(steps=3, tokens=120)
    meter.charge("sample", examples=5)
    meter.charge("tuning", flops=10, seconds=2)
    assert meter.totals["examples"] == 0 and meter.totals["flops"] == 10
    assert meter.share(Budget(240, "tokens")) == 0.5 and meter.share(Budget(1, "tokens")) == 1.0
    again = Meter()
    again.load_state_dict(meter.state_dict())
    assert again.summary() == meter.summary()
    assert meter.summary()["sample/examples"] == 5
