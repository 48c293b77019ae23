"""On a device that torch has no kernels for: NULL_GPU_CAPABILITY=7.0."""

import pytest
import torch

from .null_gpu import take, take_complaints

pytestmark = pytest.mark.host


@pytest.mark.filterwarnings("ignore")  # torch says that it does not support the device
def test_a_missing_image_is_an_error() -> None:
    assert torch.cuda.get_device_capability() == (7, 0)
    x = torch.empty(4, device="cuda")
    with pytest.raises(torch.AcceleratorError, match="no kernel image is available for execution on the device"):
        x.add_(1)
    assert ["no image for sm_70 among sm_75" in text for text in take_complaints()] == [True]
    assert not take()
