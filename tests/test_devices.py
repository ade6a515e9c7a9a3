import pytest
import torch

from dmtjepa.devices import DeviceError, check_device


def test_device_that_is_not_there():
    with pytest.raises(DeviceError, match="write cpu, cuda or cuda:N"):
        check_device("gpu0")
    with pytest.raises(DeviceError, match="runs on cpu or cuda"):
        check_device("mps")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no usable CUDA device"):
            check_device("cuda:0")
