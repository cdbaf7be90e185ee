"""Which weights a compiled graph computes with: Dynamo's guards do not look, so the backend has to."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quarot_fx.errors import OriginalsFreedError
from quarot_fx.store import SHARED

EXACT = {"w_bits": 16, "a_bits": 16, "kv_bits": 16, "nested_backend": "eager"}
QUANTIZED = {"nested_backend": "eager", "w_clip": 1.0}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        nn.init.uniform_(self.norm.weight, 0.5, 2)

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(x))))


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(module, options=EXACT, **kwargs):
    return torch.compile(module, backend="quarot", options=options, **kwargs)


def assert_follows(function, module):
    """The compiled function computes with the weights that the module has now."""
    x = torch.randn(2, 8)
    torch.testing.assert_close(function(x), module.forward(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [EXACT, {**EXACT, "nested_backend": "aot_eager"}], ids=["eager", "aot_eager"])
def test_regional_compilation_runs_every_block_with_its_own_weights(options):
    blocks = nn.Sequential(*[Block() for _ in range(3)]).eval()
    x = torch.randn(2, 8)
    expected = blocks(x)
    torch._dynamo.utils.counters.clear()
    for block in blocks:
        block.compile(backend="quarot", options=options)
    torch.testing.assert_close(blocks(x), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one graph serves all three blocks"
    torch.testing.assert_close(blocks(x), expected, rtol=1e-4, atol=1e-5)


def test_regional_compilation_quantises_every_block_with_its_own_scales():
    blocks = nn.Sequential(*[Block() for _ in range(3)]).eval()
    x = torch.randn(2, 8)
    whole = compiled(blocks, QUANTIZED)(x)
    torch._dynamo.reset()
    for block in blocks:
        block.compile(backend="quarot", options=QUANTIZED)
    # Regionally the stream between blocks is canonical and the rotations are others, so only the error's size agrees.
    expected = torch.nn.Sequential(*blocks).forward(x)
    assert (whole - expected).norm() < expected.norm()
    torch._dynamo.reset()


def test_two_models_through_one_compiled_function():
    function = compiled(lambda module, x: module(x))
    one, two = Block().eval(), Block().eval()
    for module in (one, two, one):
        assert_follows(lambda x, module=module: function(module, x), module)


def test_an_update_in_place():
    block = Block().eval()
    function = compiled(block)
    assert_follows(function, block)
    block.up.weight.mul_(2)
    assert_follows(function, block)
    block.norm.weight.add_(1)  # folded into another parameter
    assert_follows(function, block)


def test_a_replaced_parameter():
    block = Block().eval()
    function = compiled(block)
    assert_follows(function, block)
    block.down.weight = nn.Parameter(torch.randn(8, 16))
    assert_follows(function, block)


def test_data_that_is_replaced_under_a_parameter():
    block = Block().eval()
    function = compiled(block)
    assert_follows(function, block)
    block.up.weight.data = torch.randn(16, 8)
    assert_follows(function, block)


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_dict(assign):
    block = Block().eval()
    function = compiled(block)
    assert_follows(function, block)
    block.load_state_dict(Block().state_dict(), assign=assign)
    assert_follows(function, block)


def test_tied_weights_and_a_shared_submodule():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(32, 8)
            self.block = Block()
            self.head = nn.Linear(8, 32, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.block(self.block(self.table(ids))))

    model = Tied().eval()
    ids = torch.arange(6)[None]
    function = compiled(model)
    torch.testing.assert_close(function(ids), model.forward(ids), rtol=1e-4, atol=1e-5)
    model.table.weight.mul_(0.5)
    torch.testing.assert_close(function(ids), model.forward(ids), rtol=1e-4, atol=1e-5)


def test_a_graph_break_leaves_what_crosses_it_canonical():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = Broken().eval()
    assert_follows(compiled(model), model)


def test_a_mutated_buffer_is_an_input_and_not_a_constant():
    class Counting(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.zeros(8))

        def forward(self, x):
            self.shift.add_(1)
            return super().forward(x + self.shift)

    model, twin = Counting().eval(), Counting().eval()
    twin.load_state_dict(model.state_dict())
    function = compiled(model)
    for _ in range(3):
        x = torch.randn(2, 8)
        torch.testing.assert_close(function(x), twin(x), rtol=1e-4, atol=1e-5)
    assert model.shift[0] == 3


def test_graphs_of_one_model_share_constants():
    block = Block().eval()
    function = compiled(block, QUANTIZED, dynamic=False)
    function(torch.randn(2, 8))
    made = len(SHARED)
    function(torch.randn(3, 8))  # a new shape, hence a new graph
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert len(SHARED) == made, "the second graph reads what the first one stored"


def test_constants_die_with_what_holds_them():
    gc.collect()
    before = len(SHARED)
    block = Block().eval()
    function = compiled(block, QUANTIZED)
    function(torch.randn(2, 8))
    assert len(SHARED) > before
    gone = weakref.ref(block.up.weight)
    del block, function
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
    assert len(SHARED) == before


def test_freed_originals_are_released_and_the_graph_goes_on():
    block = Block().eval()
    x = torch.randn(2, 8)
    expected = block(x)
    function = compiled(block, {**EXACT, "free_originals": True}, dynamic=False)
    torch.testing.assert_close(function(x), expected, rtol=1e-4, atol=1e-5)
    assert block.up.weight.isnan().all()
    assert block.up.weight.untyped_storage().data_ptr() == block.down.weight.untyped_storage().data_ptr()
    torch.testing.assert_close(function(x), expected, rtol=1e-4, atol=1e-5)
    assert function(torch.randn(3, 8)).isfinite().all(), "a new shape takes its constants from the store"


def test_writing_to_a_freed_original_is_an_error():
    block = Block().eval()
    function = compiled(block, {**EXACT, "free_originals": True})
    function(torch.randn(2, 8))
    block.load_state_dict(Block().state_dict())
    with pytest.raises(OriginalsFreedError, match="updated in place"):
        function(torch.randn(2, 8))
    assert block.up.weight.isnan().all(), "others share the memory that was written to"


def test_a_freed_original_that_is_needed_in_another_form_is_an_error():
    block = Block().eval()
    compiled(block, {**EXACT, "free_originals": True})(torch.randn(2, 8))
    with pytest.raises(OriginalsFreedError, match=r"(up|norm|down)\.weight"):
        compiled(block, QUANTIZED)(torch.randn(2, 8))
