import pytest
import torch

from quarot_fx import nan_memory as module
from quarot_fx.nan_memory import nan_memory

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
FLOATS = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", FLOATS)
def test_it_is_nan_in_every_dtype_from_end_to_end(dtype):
    numbers = nan_memory(5 * 2**20 + 8, DEVICE)[: 5 * 2**20 + 8].view(dtype)
    assert numbers.device == DEVICE
    assert numbers.isnan().all()


def test_all_share_what_is_large_enough():
    first = nan_memory(1000, DEVICE)
    assert nan_memory(10, DEVICE) is first
    larger = nan_memory(first.numel() + 1, DEVICE)
    assert larger.numel() > first.numel()
    assert nan_memory(1000, DEVICE) is larger
    assert first.view(torch.float32 if first.numel() % 4 == 0 else torch.float8_e5m2).isnan().all()


@pytest.mark.kernels
@pytest.mark.skipif(DEVICE.type == "cpu", reason="on the CPU it is as large as it looks")
def test_on_a_gpu_it_takes_no_more_however_large_it_is():
    _, whole = torch.cuda.mem_get_info()
    numbers = nan_memory(2 * whole, DEVICE).view(torch.bfloat16)  # more than there is
    assert numbers.nbytes >= 2 * whole
    assert numbers[:: 2**19].isnan().all()
    assert numbers[-1].isnan()


@pytest.mark.kernels
@pytest.mark.skipif(DEVICE.type == "cpu", reason="only devices of a kind that may be many have numbers")
def test_a_device_without_a_number_is_the_current_one():
    assert nan_memory(1, torch.device("cuda")) is nan_memory(1, torch.device("cuda", torch.cuda.current_device()))


def test_a_driver_that_cannot_map_is_named(monkeypatch):
    monkeypatch.setattr(module, "_range", lambda size, device: module._call("cuMemCreate"))
    monkeypatch.setattr(module, "_driver", lambda: type("Old", (), {"cuMemCreate": lambda *args: 801})())
    made = torch.full
    monkeypatch.setattr(torch, "full", lambda *args, device, **options: made(*args, **options))
    with pytest.warns(UserWarning, match=r"share 1 MiB of cuda:0, not 2: .* \(cuMemCreate returned 801\)"):
        memory = module._mapped(2**20, torch.device("cuda", 0))
    assert memory.view(torch.float32).isnan().all()
