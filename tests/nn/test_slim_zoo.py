"""slim_ over the bestiary: who converts is the same network at full width, and the narrow one that it is cut to."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offramp.errors import WidthError
from offramp.graph._guest import flat
from offramp.nn.slim import slim_
from zoo import ZOO, Animal

REFUSED = {  # by name: op and reason in the error; attention splits channels into heads at places that are written down
    "torchvision:vit_b_16": "reshape .* has the number of channels written into it",
    "torchvision:swin_t": "linear .* uses weights that are no layer's own",
    "torchvision:swin_v2_t": "view .* has the number of channels written into it",
    "timm:efficientvit_b0": "matmul .* nobody here can follow",
    "timm:maxvit_rmlp_pico_rw_256": "view .* has the number of channels written into it",
    "timm:levit_128s": "split .* at places that are written into it",
    "timm:mobilevit_xxs": "reshape .* has the number of channels written into it",
    "timm:edgenext_xx_small": "matmul .* nobody here can follow",
    "timm:deit_tiny_patch16_224": "reshape .* has the number of channels written into it",
    "timm:xcit_nano_12_p16_224": "matmul .* nobody here can follow",
    "smp:MAnet": "matmul .* nobody here can follow",
    "smp:Segformer": "matmul .* nobody here can follow",
    "transformers:BertForSequenceClassification": "scaled_dot_product_attention .* nobody here can follow",
    "transformers:DistilBertForSequenceClassification": "scaled_dot_product_attention .* nobody here can follow",
    "transformers:AlbertForSequenceClassification": "scaled_dot_product_attention .* nobody here can follow",
    "transformers:SegformerForSemanticSegmentation": "view .* has the number of channels written into it",
    "transformers:ViTForImageClassification": "scaled_dot_product_attention .* nobody here can follow",
    "nasty:inplace": "getitem .* takes channels between places that are written into it",
    "nasty:folded": "view .* has the number of channels written into it",
    "nasty:custom": "_Square_apply .* nobody here can follow",
    "nasty:channel_major": "module blocks.0 .* nobody here can follow",
}
CONVERTED = [animal for animal in ZOO if animal.name not in REFUSED]


def tensors(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        said = model(**inputs) if isinstance(inputs, dict) else model(*args)
    return [leaf for leaf in flat(said)[0] if isinstance(leaf, Tensor)]


def state_of(model: nn.Module) -> dict[str, Any]:
    return {"classes": [type(module) for module in model.modules()], "keys": list(model.state_dict()),
            "flags": [module.training for module in model.modules()],
            "rigs": [name for module in model.modules() for name in vars(module) if "offramp" in name]}


@pytest.mark.parametrize("animal", CONVERTED, ids=str)
def test_it_converts(animal: Animal) -> None:
    model, inputs = animal.model(), animal.inputs(2)
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    net = slim_(model, (0.5, 1.0), example_inputs=inputs)
    untouched = tensors(animal.model(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(tensors(net, inputs), untouched, strict=True))
    narrow = net.narrow(0.5)
    with net.at(0.5):
        switched = tensors(net, inputs)
    for ours, plain, full in zip(switched, tensors(narrow, inputs), untouched, strict=True):
        assert ours.shape == full.shape
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)
    assert [type(module) for module in narrow.modules()] == classes and list(narrow.state_dict()) == keys
    assert not any("offramp" in name for module in narrow.modules() for name in vars(module))


@pytest.mark.parametrize("name", REFUSED)
def test_the_rest_say_why_and_are_left_as_found(name: str) -> None:
    animal = next(animal for animal in ZOO if animal.name == name)
    model = animal.model()
    before = state_of(model)
    with pytest.raises(WidthError, match=REFUSED[name]) as caught:
        slim_(model, (0.5, 1.0), example_inputs=animal.inputs(2))
    assert "where=" in str(caught.value) and ".py:" in str(caught.value)
    assert "slim.py" not in str(caught.value)  # the line told is the network's
    assert state_of(model) == before


def test_most_convolutional_networks_convert() -> None:
    assert len(CONVERTED) >= 45
