"""Layers against a plain model of them: all numbers, rounded, in tensors that grow."""

from __future__ import annotations

import copy

import pytest
import torch
from caches import quantized
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from quarot_fx.cache.formats import PlainFormat, QuantizedFormat
from quarot_fx.cache.growing import PAGE, GrowingLayer
from quarot_fx.cache.sliding import GrowingSlidingLayer, StaticSlidingLayer
from quarot_fx.cache.static import StaticLayer
from quarot_fx.errors import CacheFullError, CacheInputError, CropError, GroupSizeError, OffloadError, OptionError

HEADS, K_SIZE, V_SIZE, WINDOW, ROOM = 2, 12, 6, 5, 24  # sizes that are no powers of 2, of which keys and values differ
FORMATS = QuantizedFormat(4), QuantizedFormat(3, group=3)
MAKE = {
    "static": lambda: StaticLayer(*FORMATS, "layer 0", ROOM),
    "growing": lambda: GrowingLayer(*FORMATS, "layer 0"),
    "static-sliding": lambda: StaticSlidingLayer(*FORMATS, "layer 0", WINDOW),
    "growing-sliding": lambda: GrowingSlidingLayer(*FORMATS, "layer 0", WINDOW),
}


def keys_and_values(batch: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, tokens, size, generator=generator) for size in (K_SIZE, V_SIZE))


class LayerMachine(RuleBasedStateMachine):
    """Any sequence of calls. ``told`` is what a layer was told, rounded, and not taken back."""

    kind = ""

    @initialize(batch=st.integers(1, 2), tokens=st.integers(1, 2 * WINDOW), records=st.booleans())
    def first_tokens(self, batch, tokens, records):
        self.layer, self.seed = MAKE[self.kind](), 0
        self.told = keys_and_values(batch, 0)
        self.stored = 0  # tokens that a growing window holds
        self.records = records and self.kind == "growing-sliding"
        if self.records:
            self.layer.activate_past_recording()
        self.append(tokens)

    @property
    def length(self) -> int:
        return self.told[0].shape[2]

    @property
    def reach(self) -> int:
        """How many tokens before it the next one attends to."""
        return min(self.length, WINDOW - 1) if self.layer.is_sliding else self.length

    def change(self, change) -> None:
        self.told = tuple(change(x) for x in self.told)

    @rule(tokens=st.one_of(st.just(1), st.integers(1, 2 * WINDOW)))
    def append(self, tokens):
        if self.kind == "static" and self.length + tokens > ROOM:
            with pytest.raises(CacheFullError):
                self.layer.get_mask_sizes(tokens)
            return
        self.seed += 1
        keys, values = keys_and_values(self.told[0].shape[0], tokens, self.seed)
        visible, first = self.layer.get_mask_sizes(tokens)
        assert first <= self.length - self.reach
        read = self.layer.update(keys, values)
        new = quantized(keys, 4), quantized(values, 3, group=3)
        self.told = tuple(torch.cat(pair, dim=2) for pair in zip(self.told, new, strict=True))
        self.stored = self.stored + tokens if self.records else min(self.stored + tokens, WINDOW - 1)
        assert self.layer.get_seq_length() == self.length
        for mine, expected in zip(read, self.told, strict=True):
            assert mine.shape[2] == visible
            assert mine.isfinite().all()  # where no token is, attention multiplies by 0
            expected = expected[:, :, first:]
            torch.testing.assert_close(mine[:, :, : expected.shape[2]], expected, rtol=0, atol=1e-6)

    @rule(count=st.integers(0, 6))
    def crop(self, count):
        left = self.length - count
        if self.kind == "growing-sliding":
            is_possible = left >= 0 and self.stored - count >= min(left, WINDOW - 1)
        elif self.kind == "static-sliding":
            is_possible = left >= 0 and (count == 0 or self.length <= WINDOW)
        else:
            is_possible = left >= 0
        if not is_possible:
            with pytest.raises(CropError):
                self.layer.crop(-count)
            return
        self.layer.crop(-count)
        self.change(lambda x: x[:, :, :left])
        self.stored = min(self.stored - count, WINDOW - 1)

    @rule(data=st.data())
    def reorder(self, data):
        batch = self.told[0].shape[0]
        index = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch)))
        addresses = [part.data_ptr() for packed in self.layer.packed for part in packed.parts]
        self.layer.reorder_cache(index)
        assert addresses == [part.data_ptr() for packed in self.layer.packed for part in packed.parts]
        self.change(lambda x: x[index])

    @precondition(lambda self: self.told[0].shape[0] < 4)
    @rule()
    def repeat(self):
        self.layer.batch_repeat_interleave(2)
        self.change(lambda x: x.repeat_interleave(2, dim=0))

    @precondition(lambda self: self.told[0].shape[0] > 1)
    @rule()
    def select(self):
        index = torch.arange(1, self.told[0].shape[0])
        self.layer.batch_select_indices(index)
        self.change(lambda x: x[index])

    @rule()
    def reset(self):
        self.layer.reset()
        self.change(lambda x: x[:, :, :0])
        self.stored = 0

    @rule()
    def go_on_with_a_copy(self):
        original, self.layer = self.layer, copy.deepcopy(self.layer)
        original.reset()

    @rule()
    def read(self):
        for mine, expected in zip((self.layer.keys, self.layer.values), self.told, strict=True):
            assert mine.shape[2] >= self.reach
            torch.testing.assert_close(mine, expected[:, :, self.length - mine.shape[2] :], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", MAKE)
def test_any_sequence_of_calls(kind):
    machine = type("Machine", (LayerMachine,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=12, deadline=None))


# -- what a layer holds ----------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(2, None), (3, 4), (4, None), (4, 6), (8, None)])
def test_parts_have_the_shapes_that_are_documented(bits, group):
    layer = StaticLayer(QuantizedFormat(bits, group), PlainFormat(), "layer 0", max_cache_len=7)
    layer.lazy_initialization(*keys_and_values(3, 0))
    codes, scale, zero = layer.packed_keys.parts
    groups = K_SIZE // (group or K_SIZE)
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float32, torch.uint8)
    assert codes.shape == (3, HEADS, 7, -(-K_SIZE * bits // 8))
    assert scale.shape == zero.shape == (3, HEADS, 7, groups)
    assert layer.packed_values.parts[0].shape == (3, HEADS, 7, V_SIZE)
    assert layer.packed_keys.nbytes == codes.numel() + 5 * scale.numel()
    assert layer.dense_nbytes == 3 * HEADS * 7 * (K_SIZE + V_SIZE) * 2


def test_room_grows_by_pages():
    layer = MAKE["growing"]()
    layer.update(*keys_and_values(1, PAGE - 1))
    codes = layer.packed_keys.parts[0]
    layer.update(*keys_and_values(1, 1))
    assert layer.packed_keys.parts[0] is codes
    layer.update(*keys_and_values(1, PAGE + 1))
    assert layer.packed_keys.capacity == 3 * PAGE


def test_windows_store_no_more_than_the_window():
    for kind, room in (("static-sliding", WINDOW), ("growing-sliding", WINDOW - 1)):
        layer = MAKE[kind]()
        layer.update(*keys_and_values(1, 20 * WINDOW))
        assert layer.packed_keys.capacity == room
        assert layer.packed_keys.parts[0].untyped_storage().nbytes() == layer.packed_keys.parts[0].nbytes


def test_static_layers_keep_their_addresses():
    for kind in ("static", "static-sliding"):
        layer = MAKE[kind]()
        layer.lazy_initialization(*keys_and_values(2, 0))
        tensors = [layer.length, *layer.packed_keys.parts, *layer.packed_values.parts]
        assert all(tensor._dynamo_static_input_type for tensor in tensors)
        layer.update(*keys_and_values(2, 4))
        layer.update(*keys_and_values(2, 1))
        layer.crop(-2)
        layer.reorder_cache(torch.tensor([1, 1]))
        layer.reset()
        after = [layer.length, *layer.packed_keys.parts, *layer.packed_values.parts]
        assert all(a is b for a, b in zip(tensors, after, strict=True))


def test_reset_and_crop_leave_no_nan_behind():
    keys, values = keys_and_values(1, 4)
    layer = MAKE["static"]()
    for forget in (layer.reset, lambda: layer.crop(-4)):
        layer.update(torch.full_like(keys, torch.nan), values)
        forget()
        layer.update(keys[:, :, :1], values[:, :, :1])
        assert layer.update(keys[:, :, 1:2], values[:, :, 1:2])[0].isfinite().all()
        layer.reset()


def test_a_static_layer_is_as_new_when_all_is_taken_back():
    layer = MAKE["static"]()
    layer.update(*keys_and_values(1, 4))
    assert layer.get_mask_sizes(3) == (ROOM, 0)
    layer.crop(-4)
    assert layer.get_mask_sizes(3) == (3, 0)
    assert layer.get_seq_length() == 0


def test_tensors_made_in_inference_mode_serve_outside_of_it():
    for make in MAKE.values():
        layer = make()
        with torch.inference_mode():
            layer.update(*keys_and_values(1, 3))
        with torch.no_grad():
            layer.update(*keys_and_values(1, PAGE if isinstance(layer, GrowingLayer) else 1))
            layer.crop(0)
        with torch.inference_mode():
            layer.update(*keys_and_values(1, 1))
        layer.reorder_cache(torch.tensor([0]))


def test_no_graph_grows_with_the_cache():
    for make in MAKE.values():
        layer = make()
        for _ in range(2):
            read = layer.update(*(x.requires_grad_() for x in keys_and_values(1, 3)))
        assert not any(x.requires_grad for x in read)


def test_offloading():
    layer = MAKE["growing"]()
    before, _ = layer.update(*keys_and_values(1, 3))
    layer.offload()
    after, _ = layer.update(*keys_and_values(1, 1))
    torch.testing.assert_close(after[:, :, :3], before, rtol=0, atol=0)
    with pytest.raises(OffloadError, match=r"layer 0 cannot be offloaded.*without max_cache_len"):
        MAKE["static"]().offload()


# -- mistakes --------------------------------------------------------------------------------------


def test_a_static_layer_that_is_full():
    layer = MAKE["static"]()
    layer.update(*keys_and_values(1, ROOM - 1))
    expected = f"layer 0 holds {ROOM - 1} of at most {ROOM} tokens, and 2 more came. .*max_cache_len={ROOM + 1}"
    for call in (lambda: layer.get_mask_sizes(2), lambda: layer.update(*keys_and_values(1, 2))):
        with pytest.raises(CacheFullError, match=expected):
            call()
    layer.reset()
    with pytest.raises(CacheFullError, match=f"holds 0 of at most {ROOM} tokens"):
        layer.get_mask_sizes(ROOM + 1)


@pytest.mark.parametrize(
    ("change", "given"),
    [
        (lambda x: torch.cat((x, x)), "[4, 2, tokens, 12]"),
        (lambda x: x[:, :1], "[2, 1, tokens, 12]"),
        (lambda x: x[..., :4], "[2, 2, tokens, 4]"),
        (lambda x: x.half(), "torch.float16 [2, 2, tokens, 12]"),
    ],
    ids=["batch", "heads", "size", "dtype"],
)
def test_keys_unlike_those_before(change, given):
    layer = MAKE["static"]()
    keys, values = keys_and_values(2, 1)
    layer.update(keys, values)
    with pytest.raises(CacheInputError) as caught:
        layer.update(change(keys), values)
    assert given in str(caught.value)
    assert "the keys of layer 0 are" in str(caught.value)
    assert "made for torch.float32 [2, 2, tokens, 12]" in str(caught.value)


def test_a_group_that_divides_keys_and_not_values():
    layer = StaticLayer(QuantizedFormat(4, 4), QuantizedFormat(4, 4), "layer 3", ROOM)
    with pytest.raises(GroupSizeError, match=r"group=4 .* the 6 elements that each of the values of layer 3 has"):
        layer.update(*keys_and_values(1, 1))


def test_tokens_that_cannot_be_taken_back():
    layer = MAKE["growing"]()
    layer.update(*keys_and_values(1, 3))
    with pytest.raises(CropError, match="cannot take back 4 tokens from layer 0: it holds 3"):
        layer.crop(-4)
    with pytest.raises(OptionError, match="-3 forgets the last 3 tokens"):
        layer.crop(2)
    window = MAKE["growing-sliding"]()
    window.update(*keys_and_values(1, 2 * WINDOW))
    with pytest.raises(CropError, match=r"moved on. Call activate_past_recording\(\)"):
        window.crop(-1)
    ring = MAKE["static-sliding"]()
    with pytest.raises(CropError, match="without max_cache_len"):
        ring.activate_past_recording()
