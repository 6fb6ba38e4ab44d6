from __future__ import annotations

import timm
import torch

from bim.models.initialization import NoInitialization


def test_a_model_built_without_initialization_has_the_same_parameters_and_draws_nothing() -> None:
    name, args = "swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1)}
    with torch.device("meta"):
        reference = timm.create_model(name, **args)
        with NoInitialization():
            model = timm.create_model(name, **args)
    shapes = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    assert shapes == {key: (value.shape, value.dtype) for key, value in reference.state_dict().items()}
    state = torch.get_rng_state()
    with NoInitialization():
        linear = torch.nn.Linear(2, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.nn.init.ones_(linear.weight)
    assert torch.equal(linear.weight, torch.ones(3, 2))


def test_without_initialization_buffers_have_their_values() -> None:
    args = {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1)}
    reference = timm.create_model("swin_tiny_patch4_window7_224", **args)
    with NoInitialization():
        model = timm.create_model("swin_tiny_patch4_window7_224", **args)
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(reference.named_buffers()).keys()
    assert all(torch.equal(buffers[key], value) for key, value in reference.named_buffers())
