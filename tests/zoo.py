"""The bestiary: networks that libraries ship, and some that nobody should write, each with example inputs.

All are small or take small inputs, and none has pretrained weights. ``LIBRARY`` and ``NASTY`` are tuples of
:class:`Animal`; what a test needs of one is ``animal.model()`` and ``animal.inputs()``.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LIBRARY", "NASTY", "ZOO", "Animal"]


@dataclass(frozen=True)
class Animal:
    """A network with a name, a maker and example inputs."""

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, ...] | Callable[[], Any] = (3, 64, 64)
    """Shape of one row of the one input; or a function that makes all inputs."""
    within: str | None = None
    trains: bool = True
    """Whether it runs in train mode on such small inputs."""

    def model(self) -> nn.Module:
        """A new model, always with the same weights."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = self.make()
            for module in model.modules():  # fresh norms are too kind: nothing would notice a wrong one
                if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and module.running_mean is not None:
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
        return model.eval()

    def inputs(self, rows: int = 4) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.size() if callable(self.size) else torch.randn(rows, *self.size)

    def __str__(self) -> str:
        return self.name


def _tv(name: str, size: int = 64, *, trains: bool = True, **kwargs: Any) -> Animal:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **kwargs)

    return Animal(f"torchvision:{name}", make, (3, size, size), trains=trains)


def _timm(name: str, size: int = 64, *, tag: str = "", **kwargs: Any) -> Animal:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **kwargs)

    return Animal(f"timm:{name}{tag}", make, (3, size, size))


def _smp(name: str, encoder: str = "resnet18", size: int = 64, **kwargs: Any) -> Animal:
    def make() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, name)(encoder_name=encoder, encoder_weights=None, classes=5, **kwargs)

    return Animal(f"smp:{name}", make, (3, size, size))


def _hf(model: str, config: str, inputs: Callable[[], Any], **kwargs: Any) -> Animal:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**kwargs))

    return Animal(f"transformers:{model}", make, inputs)


def _text() -> dict[str, Tensor]:
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 7:] = 0
    mask[3, 9:] = 0
    return {"input_ids": torch.randint(5, 90, (4, 12)), "attention_mask": mask}


def _picture() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 64, 64)}


_SEG = {"weights_backbone": None, "num_classes": 7}
_SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
          "intermediate_size": 64, "max_position_embeddings": 40}

LIBRARY: tuple[Animal, ...] = (
    _tv("resnet18"), _tv("resnet50"), _tv("densenet121"), _tv("mobilenet_v2"), _tv("mobilenet_v3_large"),
    _tv("mobilenet_v3_small"), _tv("efficientnet_b0"), _tv("convnext_tiny"), _tv("vit_b_16", image_size=64),
    _tv("swin_t"), _tv("swin_v2_t"), _tv("regnet_y_400mf"), _tv("shufflenet_v2_x1_0"),
    _tv("squeezenet1_1"), _tv("mnasnet0_5"),
    _tv("inception_v3", 96, init_weights=False, trains=False), _tv("googlenet", init_weights=False),
    _tv("fcn_resnet50", aux_loss=True, **_SEG), _tv("deeplabv3_resnet50", **_SEG),
    _tv("deeplabv3_mobilenet_v3_large", **_SEG), _tv("lraspp_mobilenet_v3_large", **_SEG),
    _timm("hrnet_w18"), _timm("hrnet_w18_small_v2", tag=":features", features_only=True), _timm("mobilenetv2_100"),
    _timm("efficientvit_b0"), _timm("fastvit_t8"), _timm("convnextv2_atto"),
    _timm("maxvit_rmlp_pico_rw_256", img_size=64),
    _timm("repvgg_a0"), _timm("levit_128s", 224), _timm("ghostnet_100"), _timm("poolformer_s12"),
    _timm("mobilevit_xxs"),
    _timm("tf_efficientnet_lite0"), _timm("edgenext_xx_small"), _timm("deit_tiny_patch16_224", img_size=64),
    _timm("resnest14d"), _timm("xcit_nano_12_p16_224", img_size=64), _timm("mixer_s32_224", img_size=64),
    _smp("Unet"), _smp("UnetPlusPlus"), _smp("FPN"), _smp("DeepLabV3Plus"), _smp("PAN", size=128), _smp("Linknet"),
    _smp("MAnet"), _smp("PSPNet"), _smp("UPerNet"), _smp("Segformer", "mit_b0"),
    _hf("BertForSequenceClassification", "BertConfig", _text, **_SMALL),
    _hf("DistilBertForSequenceClassification", "DistilBertConfig", _text, vocab_size=99, dim=32, n_layers=4, n_heads=4,
        hidden_dim=64, max_position_embeddings=40),
    _hf("AlbertForSequenceClassification", "AlbertConfig", _text, embedding_size=16, **_SMALL),
    _hf("SegformerForSemanticSegmentation", "SegformerConfig", _picture, hidden_sizes=[16, 32, 40, 64],
        decoder_hidden_size=32, num_labels=5),
    _hf("ViTForImageClassification", "ViTConfig", _picture, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=64, image_size=64),
)


class Reused(nn.Module):
    """One block, called again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(4):
            x = x + self.block(x)
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    """Writes into its own activations, across module borders, and through views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Sequential(nn.ReLU(True), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(4))
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv in self.convs:
            y = conv(x)
            x += y
            x[:, :2].mul_(0.5)
            x[:, 3] = y[:, 0]
        return self.head(x.clamp_(-2, 2).mean((2, 3)))


class ShapeInts(nn.Module):
    """Sizes read mid-graph steer reshapes; the batch is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 5)
        self.mix = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, _, height, width = x.shape
        y = self.stem(x)
        c, h, w = y.shape[1], y.shape[2], y.size(3)
        tokens = y.flatten(2).transpose(1, 2)
        for layer in self.mix:
            tokens = tokens + layer(tokens)
            if h % 2 == 0 and h * w == tokens.shape[1]:
                tokens = tokens.view(b, h // 2, 2, w, c).transpose(1, 2).reshape(b, h * w, c)
        return self.head(tokens.reshape(b, -1, c).mean(1)) * (height / width)


class Folded(nn.Module):
    """Folds rows of the batch into another dimension, carries their number along, and unfolds them at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Linear(8, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        many = x.shape[0] * x.shape[1]
        x = self.blocks[0](x)
        y = self.blocks[1](x.view(many, 8))
        y = self.blocks[2](y).view(x.shape[0], -1, 8)
        return self.last(y.mean(1))


class TwoInputs(nn.Module):
    """Two inputs, one with a default; the second is needed only at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 16), nn.Linear(4, 16), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor, extra: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        for block in self.blocks:
            x = x + block(x) * scale
        y = x + self.b(extra)
        return self.out(y), y


class DictState(nn.Module):
    """Hands a dict from block to block, and returns one with strings and nested lists in it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.memory = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, state: dict[str, Any]) -> dict[str, Any]:
            x = torch.relu(self.x(state["x"]))
            return {**state, "x": x, "memory": self.memory(state["memory"]) + x, "step": state["step"] + 1}

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DictState.Block() for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"x": x, "memory": torch.zeros_like(x), "step": 0}
        for block in self.blocks:
            state = block(state)
        logits = self.head(state["x"])
        return {"logits": logits, "kind": "made up", "steps": state["step"], "all": [state["memory"], (x,)]}


class Looped(nn.Module):
    """A loop over a ModuleList with an early ``break`` on a size, and DenseNet-like concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(4 * (i + 1), 4, 3, padding=1), nn.ReLU()) for i in range(6))
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for layer in self.layers:
            if len(seen) > 4 and seen[0].shape[-1] < 64:
                break
            seen.append(layer(torch.cat(seen, 1)))
        return self.head(torch.cat(seen, 1).mean((2, 3)))


class Dropped(nn.Module):
    """Dropout as module and as function, and a whole path dropped, all drawing random numbers in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.ReLU()) for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = F.dropout(block(x), 0.2, self.training)
            if self.training:
                y = y * x.new_empty((x.shape[0], 1)).bernoulli_(0.8)
            x = x + y
        return self.head(x)


class Counting(nn.Module):
    """Updates buffers in forward, one in place and one by assignment, also in eval mode."""

    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for i, block in enumerate(self.blocks):
            x = x + block(x)
            if i == 1:
                with torch.no_grad():
                    self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.head(x)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Square(nn.Module):
    """An autograd function of its own: no tracer sees inside."""

    def forward(self, x: Tensor) -> Tensor:
        return _Square.apply(x)


def _nested() -> nn.Module:
    def unit() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))

    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)), nn.Sequential(unit(), unit()),
        nn.Sequential(nn.Sequential(unit(), nn.Sequential(unit())), nn.MaxPool2d(2)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


def _custom() -> nn.Module:
    def unit() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), Square(), nn.Tanh())

    return nn.Sequential(unit(), unit(), unit(), unit(), nn.Linear(8, 5))


class ChannelMajor(nn.Module):
    """Keeps time first and the batch second between its blocks, as old sequence code does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.transpose(0, 1).mean(1))


class Recurrent(nn.Module):
    """LSTM layers with their tuples of states, and a mask built from a range."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(8, 8, batch_first=True) for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        keep = (torch.arange(x.shape[1], device=x.device) < 5)[None, :, None].to(x.dtype)
        for layer in self.layers:
            y, (hidden, _) = layer(x)
            x = x + y * keep
        return self.head(hidden[-1] + x.mean(1))


NASTY: tuple[Animal, ...] = (
    Animal("nasty:reused", Reused, (3, 16, 16)),
    Animal("nasty:inplace", InPlace, (3, 16, 16)),
    Animal("nasty:shape_ints", ShapeInts, (3, 16, 16)),
    Animal("nasty:folded", Folded, (6, 8)),
    Animal("nasty:two_inputs", TwoInputs, lambda: (torch.randn(4, 8), torch.randn(4, 4))),
    Animal("nasty:dict_state", DictState, (8,)),
    Animal("nasty:looped", Looped, (3, 16, 16)),
    Animal("nasty:dropped", Dropped, (8,)),
    Animal("nasty:counting", Counting, (8,)),
    Animal("nasty:nested", _nested, (3, 16, 16)),
    Animal("nasty:custom", _custom, (8,)),
    Animal("nasty:channel_major", ChannelMajor, (7, 6)),
    Animal("nasty:recurrent", Recurrent, (7, 8)),
)

ZOO = LIBRARY + NASTY
