import copy

import pytest
import torch
from torch import nn

from fsdet.modeling.base import SupportConditioned, condition_on_support


class Remembering(SupportConditioned, nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def encode_support(self, support_set):
        assert not self.training and not torch.is_grad_enabled()
        return nn.ParameterDict({"prototypes": nn.Parameter(self.layer(support_set))})


def test_memory_is_kept_outside_the_state_dict():
    model = Remembering().train()
    names = set(model.state_dict())
    assert condition_on_support(model, lambda: torch.ones(3, 2))
    assert model.training
    assert model.class_memory["prototypes"].shape == (3, 2)
    assert set(model.state_dict()) == names
    assert len(list(model.parameters())) == 2
    assert copy.deepcopy(model).class_memory["prototypes"].shape == (3, 2)
    model.keep_class_memory(None)
    with pytest.raises(RuntimeError, match="has no class memory"):
        _ = model.class_memory


def test_wrapped_detectors_are_found():
    wrapper = nn.Module()
    wrapper.module = Remembering()
    assert condition_on_support(wrapper, lambda: torch.ones(1, 2))
    assert wrapper.module.class_memory["prototypes"].shape == (1, 2)


def test_a_detector_without_memory_builds_no_support():
    def forbidden():
        raise AssertionError("no support set is needed")

    assert not condition_on_support(nn.Linear(2, 2), forbidden)


def test_mode_is_restored_after_a_failure():
    model = Remembering().train()
    with pytest.raises(RuntimeError):
        condition_on_support(model, lambda: torch.ones(3, 5))
    assert model.training
