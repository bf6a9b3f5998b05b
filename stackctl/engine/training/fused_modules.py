"""Which modules of a model are computed by the fused functions: those that give the same numbers, looked at one by one.

transformers writes norms, rotary positions and gated MLPs as chains of small operators, each of which is a pass over a
tensor of the row. :func:`fuse` gives a module of Llama's kind a forward of our own, after both have been run on a few
random tokens, small and large ones, and have agreed in outputs and gradients. Whatever differs keeps its own, and so
does every call that is not a plain step of training, in float32 or under autocast: no gradients, a cache, another
adapter, one that is switched off, dropout that is not the new adapter's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stackctl.engine.models import CACHE_ARGUMENTS
from stackctl.engine.noise import OwnDropout
from stackctl.engine.training.adapter import ADAPTER
from stackctl.engine.training.fused_functions import Product, apply_gated_mlp, apply_products, rms_norm, rotate
from stackctl.engine.training.lora_sum import is_plain

_SIZES = (1e-3, 1e-3, 1.0, 1.0, 1e3, 1e3)
"""Of the random values, token by token: a limit that OLMo puts on queries, keys and values shows with large ones, an
epsilon elsewhere in a norm with small ones."""
_TOLERANCE = 1e-4
_PROBE = "stackctl_probe"
_CAST = "stackctl_cast"
"""Where a layer has its weight in the precision of autocast."""
Forward = Callable[..., Any]


def fuse(model: PeftModel) -> int:
    """Let the modules of a model that can be computed by the fused functions be computed so; how many those are."""
    if next(model.parameters()).device.type != "cpu":
        return 0
    count = 0
    for module in model.modules():
        if all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "config", "head_dim")):
            count += _try(module, _attention, _probe_attention)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            count += _try(module, _gated_mlp, _probe_rows)
        elif type(module).__name__.endswith("RMSNorm"):
            count += _try(module, _rms_norm, _probe_rows)
    return count


def keep_casts(model: PeftModel, dtype: torch.dtype) -> None:
    """Hold the frozen weights of fused layers in the precision of autocast as well, to which they are cast in each pass
    otherwise, and in each part that is computed at once."""
    for module in model.modules():
        for layer in filter(is_plain, module.children() if "forward" in vars(module) else ()):
            base: Any = layer.get_base_layer()  # type: ignore[operator]
            vars(base)[_CAST] = base.weight.detach().to(dtype)


def _try(module: Any, make: Callable[[Any], Forward], probe: Callable[[Any], list[Tensor]]) -> bool:
    """Give a module the forward that ``make`` makes for it, if it agrees with its own."""
    if "forward" in module.__dict__:  # somebody's already
        return False
    training = module.training
    try:
        module.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            expected = probe(module)
            module.forward = make(module)
            torch.manual_seed(0)  # dropout draws the same
            found = probe(module)
        if all(_agree(*pair) for pair in zip(found, expected, strict=True)):
            return True
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        pass
    finally:
        module.train(training)
    module.__dict__.pop("forward", None)
    return False


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Of tensors (1, T, d) every token does, of a parameter's gradient the whole."""
    if found.shape != expected.shape:
        return False
    dims = (-1,) if found.ndim == 3 else tuple(range(found.ndim))
    apart, largest = (found - expected).abs().amax(dims), expected.abs().amax(dims)
    return bool((apart <= _TOLERANCE * largest.clamp_min(1e-30)).all())


# -- the forwards -------------------------------------------------------------------------------------------------


def _rms_norm(module: Any) -> Forward:
    own = module.forward
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps

    def forward(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        plain = not rest and not options and _trains(x, torch.float32) and not module.weight.requires_grad
        if not plain or x.shape[-1] != len(module.weight):  # Falcon Mamba's is of another length, and not used
            found: Tensor = own(x, *rest, **options)
            return found
        return rms_norm(x, module.weight, eps)

    return forward


def _gated_mlp(module: Any) -> Forward:
    own, layers = module.forward, _plain_layers(module, "gate_proj", "up_proj", "down_proj")

    def forward(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        products = _products(x, layers)
        if rest or options or products is None:
            found: Tensor = own(x, *rest, **options)
            return found
        return apply_gated_mlp(x, *products)

    return forward


def _attention(module: Any) -> Forward:
    """Projections of one input, rotary positions, then attention with what the module itself hands to it."""
    own, layers = module.forward, _plain_layers(module, "q_proj", "k_proj", "v_proj", "o_proj")
    options = _handed(module)

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Any:
        cache = {name: more.pop(name) for name in CACHE_ARGUMENTS if name in more}
        products = _products(hidden_states, layers)
        name = module.config._attn_implementation
        odd = any(kept is not None for kept in cache.values()) or len(hidden_states) > 1 or name == "eager"
        # Granite's hybrid hands over no positions at all, Bamba and Nemotron those of a part of each head.
        if products is None or odd or position_embeddings is None or position_embeddings[0].shape[-1] < module.head_dim:
            return own(
                hidden_states=hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
                **cache, **more,
            )  # fmt: skip
        tokens = hidden_states.shape[1]
        q, k, v = (t.view(tokens, -1, module.head_dim) for t in apply_products(hidden_states, products[:3]))
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        cosine, sine = (t[0][:, None] for t in position_embeddings)  # (T, 1, d)
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        attend = ALL_ATTENTION_FUNCTIONS[name]
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, heads, T, d)
        output, weights = attend(module, q, k, v, attention_mask, **(options | more))
        (output,) = apply_products(output.reshape(1, tokens, -1), products[3:])
        return output, weights

    return forward


def _handed(module: Any) -> dict[str, Any]:
    """What a module hands to its attention besides queries, keys, values and mask.

    Raises:
        ValueError: there is dropout in it.
    """
    seen: list[dict[str, Any]] = []
    _probe_attention(module, seen)
    if seen[0].get("dropout"):
        raise ValueError("attention with dropout")
    return seen[0]


def _plain_layers(module: nn.Module, *names: str) -> list[nn.Module]:
    """Layers with nothing but the adapter in training on them.

    Raises:
        ValueError: there is something else on one of them, or nothing.
    """
    layers = [module.get_submodule(name) for name in names]
    if not all(map(is_plain, layers)):
        raise ValueError("not every layer has the adapter in training and nothing else")
    return layers


def _trains(x: Tensor, *types: torch.dtype) -> bool:
    """Whether this is a step of training on a CPU, on values of one of these types."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and x.dtype in types


def _products(x: Tensor, layers: Sequence[Any]) -> list[Product] | None:
    """Layers as products in the precision of the step, if the adapter in training is all that is on each of them."""
    cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if cast else torch.float32
    if not _trains(x, torch.float32, dtype) or not all(is_plain(layer) for layer in layers):
        return None
    found = []
    for layer in layers:
        base = layer.get_base_layer()
        weight = vars(base).get(_CAST, base.weight)
        weight = weight if isinstance(base, nn.Linear) else weight.T
        bias = None if base.bias is None else base.bias.to(dtype)
        a, b = layer.lora_A[ADAPTER].weight.to(dtype), layer.lora_B[ADAPTER].weight.to(dtype)
        own = layer.lora_dropout[ADAPTER]
        dropout = own if isinstance(own, OwnDropout) and own.training else None
        found.append(Product(weight.to(dtype), bias, a, b, layer.scaling[ADAPTER], dropout))
    return found


# -- the probes ---------------------------------------------------------------------------------------------------


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _inputs(width: int) -> Tensor:
    return (_random(1, len(_SIZES), width) * torch.tensor(_SIZES)[:, None]).requires_grad_()


def _probe_rows(module: Any) -> list[Tensor]:
    """Output and gradients of a module of rows (1, T, d)."""
    norm = getattr(module, "weight", None)
    width = len(norm) if norm is not None else module.gate_proj.in_features
    x = _inputs(width)
    with torch.enable_grad():
        return _with_gradients(module, module(x), x)


def _probe_attention(module: Any, seen: list[dict[str, Any]] | None = None) -> list[Tensor]:
    """The same of an attention module in which every token sees itself alone."""

    def itself(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        if seen is not None:
            seen.append(options)
        groups = query.shape[1] // key.shape[1]
        return (query * repeat_kv(key, groups) + repeat_kv(value, groups)).transpose(1, 2), None

    x = _inputs(module.q_proj.in_features)
    angles = _random(1, len(_SIZES), module.head_dim // 2, seed=1).repeat(1, 1, 2)
    name = module.config._attn_implementation
    AttentionInterface.register(_PROBE, itself)
    module.config._attn_implementation = _PROBE
    try:
        with torch.enable_grad():
            output, _ = module(hidden_states=x, position_embeddings=(angles.cos(), angles.sin()), attention_mask=None)
            return _with_gradients(module, output, x)
    finally:
        module.config._attn_implementation = name


def _with_gradients(module: nn.Module, output: Tensor, x: Tensor) -> list[Tensor]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((output * _random(*output.shape, seed=2)).sum(), [x, *trained])
    return [output.detach(), *gradients]
