"""From what a user types to a network: ``torchvision:NAME``, ``timm:NAME``, ``smp:ARCH?encoder_name=...`` ..."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from offramp._extras import require
from offramp._specs import Spec, load_callable, near, parse
from offramp.errors import OfframpError
from offramp.models import cifar_resnet, deeplab, hrnet, mdeq, scene_nets, sfnet
from offramp.models.weights import WEIGHT_SUFFIXES, load_weights_

__all__ = ["load_model"]

OWN: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet20": cifar_resnet.cifar_resnet20, "cifar_resnet32": cifar_resnet.cifar_resnet32,
    "cifar_resnet44": cifar_resnet.cifar_resnet44, "cifar_resnet56": cifar_resnet.cifar_resnet56,
    "cifar_resnet110": cifar_resnet.cifar_resnet110,
    "deeplabv3plus_mobilenetv2": deeplab.deeplabv3plus_mobilenetv2,
    "deeplabv3plus_resnet50": deeplab.deeplabv3plus_resnet50,
    "hrnet_w18": hrnet.hrnet_w18, "hrnet_w18_small": hrnet.hrnet_w18_small, "hrnet_w32": hrnet.hrnet_w32,
    "hrnet_w32_pose": hrnet.hrnet_w32_pose, "hrnet_w48": hrnet.hrnet_w48,
    "mdeq_small": mdeq.mdeq_small,
    "scenes_classify": scene_nets.scenes_classify, "scenes_dense": scene_nets.scenes_dense,
    "sfnet_dfnetv1": sfnet.sfnet_dfnetv1, "sfnet_dfnetv2": sfnet.sfnet_dfnetv2,
    "sfnet_resnet18": sfnet.sfnet_resnet18, "sfnet_resnet50": sfnet.sfnet_resnet50,
}
KINDS = ("offramp", "torchvision", "timm", "smp", "hf")
HF_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


def load_model(spec: str, weights: str | None = None, num_classes: int | None = None) -> nn.Module:
    """Find a network by what a user types; it comes back in eval mode.

    ``spec`` is one of the following, each with options of its own as ``?name=value&...``, among them ``weights`` and
    ``num_classes`` (the arguments here win):

    - ``offramp:cifar_resnet56`` and the other networks of ``offramp.models``;
    - ``torchvision:resnet50``, ``timm:hrnet_w18``, ``smp:DeepLabV3Plus?encoder_name=resnet50``;
    - ``hf:NAME`` or ``hf:FOLDER`` with ``task`` one of image-classification, semantic-segmentation,
      text-classification, token-classification; code from the hub is never run;
    - ``package.module:callable``, called with the options.

    ``weights`` is a file (.safetensors, or .pth read with ``weights_only=True``), or a name that the library itself
    knows: DEFAULT or IMAGENET1K_V2 for torchvision, a tag or ``default`` for timm, imagenet (the encoder's) for smp.
    Without it the numbers are random, but for ``hf``, whose name means a checkpoint (``weights=none`` for random ones).

    >>> type(load_model("offramp:cifar_resnet20?num_classes=7")).__name__
    'CifarResNet'
    """
    parsed = parse(spec)
    options = dict(parsed.options)
    written = options.pop("weights", None)
    chosen = weights if weights is not None else (str(written) if written is not None else None)
    if "weights" in parsed.options and written is None and weights is None:
        chosen = "none"
    if num_classes is not None:
        options["num_classes"] = num_classes
    from_file = chosen is not None and chosen.lower().endswith(WEIGHT_SUFFIXES)
    named = None if from_file else chosen
    if parsed.kind in KINDS and not parsed.name:
        raise OfframpError(expected=f"{parsed.kind}:NAME", got=repr(spec), where="load_model", todo="add the name")
    if parsed.kind == "hf":
        model = _hf(parsed, "none" if from_file else named, options)
    elif parsed.kind in KINDS:
        named = None if named is not None and named.lower() == "none" else named
        maker = {"offramp": _own, "torchvision": _torchvision, "timm": _timm, "smp": _smp}[parsed.kind]
        model = maker(parsed, named, options)
    else:
        model = _callable(parsed, None if named == "none" else named, options)
    if from_file:
        assert chosen is not None
        load_weights_(model, chosen)
    return model.eval()


def _build(make: Callable[..., Any], spec: Spec, *args: Any, **options: Any) -> nn.Module:
    try:
        model = make(*args, **options)
    except OfframpError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OSError) as error:
        shown = ", ".join(f"{k}={v}" for k, v in options.items()) or "no options"
        raise OfframpError(expected=f"{spec.kind}:{spec.name} to be built with {shown}", where=spec.text,
                           got=f"{type(error).__name__}: {str(error).strip()[:400]}",
                           todo="mend the options after the ?, or the weights") from error
    if not isinstance(model, nn.Module):
        raise OfframpError(expected="an nn.Module", got=type(model).__name__, where=spec.text,
                           todo="name a function or a class that gives one")
    return model


def _unknown(spec: Spec, known: Any) -> OfframpError:
    return OfframpError(expected=f"a network of {spec.kind}", got=repr(spec.name), where=spec.text,
                        todo=near(spec.name, known))


def _own(spec: Spec, weights: str | None, options: Mapping[str, Any]) -> nn.Module:
    if spec.name not in OWN:
        raise _unknown(spec, OWN)
    if weights is not None:
        raise OfframpError(expected="a file of weights (.safetensors or .pth)", got=repr(weights), where=spec.text,
                           todo="offramp ships no weights; give the path of a file, or leave weights out")
    return _build(OWN[spec.name], spec, **options)


def _torchvision(spec: Spec, weights: str | None, options: Mapping[str, Any]) -> nn.Module:
    from torchvision import models

    if spec.name not in _torchvision_names():
        raise _unknown(spec, _torchvision_names())
    extra: dict[str, Any] = {}
    if weights is not None:
        known = ["DEFAULT", *(w.name for w in models.get_model_weights(spec.name))]
        if weights not in known:
            raise OfframpError(expected=f"weights of torchvision's {spec.name}, or a file", got=repr(weights),
                               where=spec.text, todo=near(weights, known))
    elif "weights_backbone" not in options and "backbone" in str(_signature(models.get_model_builder(spec.name))):
        extra["weights_backbone"] = None  # else torchvision fetches ImageNet weights for the backbone unasked
    return _build(models.get_model, spec, spec.name, weights=weights, **extra, **options)


def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models())


def _signature(function: Callable[..., Any]) -> str:
    import inspect

    return str(inspect.signature(function))


def _timm(spec: Spec, weights: str | None, options: Mapping[str, Any]) -> nn.Module:
    timm = require("timm", "timm: networks")
    name, options = spec.name, dict(options)
    base = name.split(".")[0]
    if base not in timm.list_models() and not name.startswith("hf-hub:"):
        raise _unknown(spec, timm.list_models())
    if weights is not None:
        if weights.lower() not in ("default", "true"):
            tags = [m.split(".", 1)[1] for m in timm.list_pretrained(f"{base}.*")]
            if weights not in tags:
                raise OfframpError(expected=f"weights of timm's {base} (a tag, or default), or a file",
                                   got=repr(weights), where=spec.text, todo=near(weights, [*tags, "default"]))
            name = f"{base}.{weights}"
        options["pretrained"] = True
    return _build(timm.create_model, spec, name, **options)


def _smp(spec: Spec, weights: str | None, options: Mapping[str, Any]) -> nn.Module:
    smp = require("segmentation_models_pytorch", "smp: networks")
    found = {name: getattr(smp, name) for name in dir(smp)}
    architectures = [name for name, it in found.items() if isinstance(it, type) and issubclass(it, nn.Module)]
    if spec.name not in architectures:
        raise _unknown(spec, architectures)
    options = dict(options)
    if "num_classes" in options:
        options["classes"] = options.pop("num_classes")
    encoder = options.get("encoder_name")
    if encoder is not None and not str(encoder).startswith("tu-") and encoder not in smp.encoders.get_encoder_names():
        raise OfframpError(expected="an encoder of smp", got=repr(encoder), where=spec.text,
                           todo=near(str(encoder), smp.encoders.get_encoder_names()))
    options.setdefault("encoder_weights", weights)  # smp would fetch ImageNet weights unasked
    return _build(getattr(smp, spec.name), spec, **options)


def _hf(spec: Spec, weights: str | None, options: Mapping[str, Any]) -> nn.Module:
    transformers = require("transformers", "hf: networks")
    options = dict(options)
    if options.pop("trust_remote_code", False):
        raise OfframpError(expected="a network whose code is in transformers", got="trust_remote_code", where=spec.text,
                           todo="offramp never runs code from the hub; import the class yourself and name it as "
                                "package.module:callable")
    task = options.pop("task", None)
    if task is not None and task not in HF_CLASSES:
        raise OfframpError(expected=f"a task among {', '.join(HF_CLASSES)}", got=repr(task), where=spec.text,
                           todo=near(str(task), HF_CLASSES))
    if "num_classes" in options:
        options |= {"num_labels": options.pop("num_classes"), "ignore_mismatched_sizes": True}
    auto = getattr(transformers, HF_CLASSES[task] if task else "AutoModel")
    if weights is not None and weights.lower() == "none":
        options.pop("ignore_mismatched_sizes", None)

        def from_config(**kwargs: Any) -> Any:
            config = transformers.AutoConfig.from_pretrained(spec.name, trust_remote_code=False, **kwargs)
            return auto.from_config(config, trust_remote_code=False)

        return _build(from_config, spec, **options)
    if weights is not None and weights.lower() not in ("default", "true"):
        options["revision"] = weights
    return _build(auto.from_pretrained, spec, spec.name, trust_remote_code=False, use_safetensors=True, **options)


def _callable(spec: Spec, weights: str | None, options: Mapping[str, Any]) -> nn.Module:
    expected = f"a network named {', '.join(f'{k}:NAME' for k in KINDS)} or package.module:callable"
    close = near(spec.kind, KINDS)
    if not spec.name and spec.kind in _torchvision_names():
        close = f"did you mean torchvision:{spec.kind}?"
        raise OfframpError(expected=expected, got=repr(spec.text), where="load_model", todo=close)
    if not spec.name or ("." not in spec.kind and close.startswith("did you mean")):
        guess = near(spec.kind, [f"{k}" for k in KINDS] + [f"offramp:{n}" for n in OWN])
        raise OfframpError(expected=expected, got=repr(spec.text), where="load_model", todo=guess)
    function = load_callable(f"{spec.kind}:{spec.name}", "load_model")
    if weights is not None:
        options = {**options, "weights": weights}
    return _build(function, spec, **options)
