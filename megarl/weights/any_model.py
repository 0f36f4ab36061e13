"""Models of transformers outside of the name map: what their own class says of them, made without memory.

Importing transformers takes seconds, and a model of the map needs none of this: it is imported where it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.errors import ModelFolderError
from megarl.weights.config_fields import Fields, shown
from megarl.weights.model_shape import (
    CLASSIFIERS,
    FAMILIES,
    VALUE_HEAD,
    ModelShape,
    Rope,
    architecture_of,
    check_labels,
    parse_model_shape,
    read_config,
    refuse_quantized,
)
from megarl.weights.name_map import VALUE_HEAD_BIAS

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

# What megarl's attention is told and does, or leaves out since it doesn't change what comes out without gradients.
_KNOWN_ARGUMENTS = frozenset(
    {"dropout", "scaling", "sliding_window", "softcap", "is_causal", "causal", "attending"}
    | {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
)
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Their frequencies change where a sequence, or a batch, is longer than this; engines have other rules for that.
_ROPE_BY_LENGTH = ("dynamic", "longrope")
_PROBE = "megarl_probe"
_TOKENS = 4


def read_shape(folder: str | Path, key: str = "model.path") -> ModelShape:
    """Read the ModelShape of any causal language model that transformers loads, or of one of its classifiers.

    key: what names it, for the error. Raises ModelFolderError where config.json is absent or broken, transformers can't
    load what it describes, or its weights can't be trained, moved or saved as they are.
    """
    path, config = read_config(folder, key)
    fields = Fields(config, str(path))
    architecture, family = architecture_of(fields)
    if family in FAMILIES or architecture == "(none)":
        return parse_model_shape(config, str(path))
    refuse_quantized(fields)
    kind = next((kind for kind in CLASSIFIERS if architecture.endswith(kind)), None)
    if kind is None:
        return _shape_of(path.parent, fields, architecture)
    check_labels(architecture, fields)
    shape = _shape_of(path.parent, fields, architecture, is_classifier=True)
    _check_classifier(path.parent, fields, architecture, kind, shape)
    return shape.with_value_head()


def empty_model(folder: str | Path, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """Return a folder's causal language model without memory and dropout. attention: None is transformers' own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for name, value in vars(config).items():  # log-probs would differ between two passes
        if isinstance(value, float) and name.endswith(("dropout", "pdrop")):
            setattr(config, name, 0.0)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
    return model


def head_elsewhere(folder: str | Path, kind: str, shape: ModelShape) -> tuple[str, str]:
    """Return the class name of transformers' classifier of a language model, and the name of a tensor only one has.

    kind: of CLASSIFIERS. Both are empty where transformers has no such classifier, the tensor also where none differs.
    """
    import torch
    import transformers

    auto = getattr(transformers, f"AutoModel{kind}")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, num_labels=1)
    if type(config) not in auto._model_mapping:
        return "", ""
    with torch.device("meta"):
        model = auto.from_config(config)
    theirs = {name for name, _ in model.named_parameters()} - {VALUE_HEAD_BIAS}
    ours = {name for name, _ in shape.with_value_head().tensors}
    return type(model).__name__, min(theirs - ours or ours - theirs, default="")


def _check_classifier(folder: Path, fields: Fields, architecture: str, kind: str, shape: ModelShape) -> None:
    """Refuse a critic or reward model that isn't a language model with a linear ``score`` in place of its output."""
    known, elsewhere = head_elsewhere(folder, kind, shape)
    known = known or shape.critic_architecture  # megarl's own, of which transformers has none
    if architecture != known:
        why = f"of such a config transformers makes a {known}"
    elif elsewhere:
        why = f"it differs at {elsewhere} from {shape.family} with {VALUE_HEAD} in place of its output layer"
    else:
        return
    raise ModelFolderError(f"{fields.source}: architecture {shown(architecture)} is not supported: {why}")


def _shape_of(folder: Path, fields: Fields, family: str, *, is_classifier: bool = False) -> ModelShape:
    """Return the ModelShape of a language model that the name map doesn't have, or that a classifier was made of."""
    import torch
    import transformers

    version, probe = transformers.__version__, _Probe()
    with _named(f"{fields.source}: transformers {version} can't load architecture {shown(family)}"):
        model = empty_model(folder, torch.float32, None)
    if is_classifier:
        family = type(model).__name__
    _refuse_what_cannot_move(model, fields, family)
    if not probe.stands_in(folder):
        with _named(f"{fields.source}: transformers {version} can't run architecture {shown(family)} on tokens alone"):
            _run(model, {})
    return _shape(model, fields, family, own_attention=not probe.is_enough)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn whatever the code of a model's class raises into a ModelFolderError."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelFolderError(
            f"{what}: {reason}; supported are {', '.join(FAMILIES)}, and on FSDP causal language models of transformers"
        ) from error


class _Probe:
    """An attention that computes nothing and notes what it is asked for.

    is_enough: whether megarl's attention can stand in for a model's: all that is mixed of tokens goes through it.
    """

    def __init__(self) -> None:
        self.asked: list[Mapping[str, Any]] = []
        self.is_enough = False

    def stands_in(self, folder: Path) -> bool:
        """Pass tokens through the folder's model with this attention, and return whether that is enough."""
        import torch
        from transformers import AttentionInterface

        AttentionInterface.register(_PROBE, self._attend)
        try:
            model = empty_model(folder, torch.float32, _PROBE)
            _run(model, {"attending": self, "use_cache": False})
        except Exception:  # noqa: BLE001 (classes that have none but their own attention; with it they are run next)
            return False
        self.is_enough = (
            len(self.asked) == model.config.num_hidden_layers
            and all(self._is_known(asked) for asked in self.asked)
            and self._is_told_of_windows(model.config)
            and "position_ids" in _arguments(model)
            and not any(isinstance(module, torch.nn.Conv1d) for module in model.modules())
        )
        return self.is_enough

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **asked: Any
    ) -> tuple[Tensor, None]:
        self.asked.append({**asked, "mask": mask, "causal": getattr(module, "is_causal", True) or None})
        batch, heads, length, _ = query.shape
        return query.new_empty(batch, length, heads, value.shape[-1]), None

    def _is_known(self, asked: Mapping[str, Any]) -> bool:
        others = {name for name, value in asked.items() if name not in _KNOWN_ARGUMENTS and value is not None}
        is_causal = asked["causal"] is not None and asked.get("is_causal") in (True, None)
        return not others and is_causal and asked.get("attending") is self

    def _is_told_of_windows(self, config: Any) -> bool:
        """Whether every layer that looks back a window only says so where it attends."""
        num_told = sum(asked.get("sliding_window") is not None for asked in self.asked)
        if types := list(getattr(config, "layer_types", None) or ()):
            return set(types) <= set(_LAYER_TYPES) and num_told == types.count(_LAYER_TYPES[-1])
        return num_told > 0 or getattr(config, "sliding_window", None) is None


def _arguments(model: PreTrainedModel) -> frozenset[str]:
    """Return the arguments of a model's forward pass by name."""
    import inspect

    return frozenset(inspect.signature(model.forward).parameters)


def _run(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Pass a few tokens through a model without memory, as megarl does: with positions where it attends itself."""
    import torch

    model.config.pad_token_id = None  # some classes look for it among the tokens, to warn of it
    with torch.device("meta"), torch.no_grad():
        positions = {"position_ids": torch.arange(_TOKENS)[None]} if "attending" in given else {}
        model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.int64), **positions, **given)


def _refuse_what_cannot_move(model: PreTrainedModel, fields: Fields, family: str) -> None:
    """Refuse models whose checkpoint isn't their parameters, one by one and by the same names."""
    config, names = model.config, dict(model.named_parameters())
    why = None
    if type(model).__name__ != family:
        why = f"transformers makes a {type(model).__name__} of it, not a causal language model of that name"
    elif config.get_text_config() is not config:
        why = "it reads more than text"
    elif any(".experts." in name for name in names):
        why = "it has experts, whose tensors are apart in a checkpoint and together in memory"
    elif any(getattr(module, "is_causal", None) is False for module in model.modules()):
        why = "it attends to what follows"
    elif any(parameter.dim() == 0 for parameter in names.values()):
        why = "it has parameters without rows, which FSDP can't split"
    elif buffers := sorted(set(model.state_dict()) - set(dict(model.named_parameters(remove_duplicate=False)))):
        why = f"its checkpoint has what isn't trained: {buffers[0]}"
    elif model.get_output_embeddings() is not getattr(model, "lm_head", None):
        why = "its output layer isn't named lm_head"
    if why is not None:
        raise ModelFolderError(
            f"{fields.source}: architecture {shown(family)} is not supported: {why}; "
            f"supported are {', '.join(FAMILIES)}, and on FSDP causal language models whose checkpoint is their "
            "parameters"
        )


def _shape(model: PreTrainedModel, fields: Fields, family: str, *, own_attention: bool) -> ModelShape:
    """Return the sizes that a model's own class has of config.json, its tensors among them."""
    config = model.config
    hidden = _whole(config, fields, "hidden_size")
    heads = _whole(config, fields, "num_attention_heads", 1)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return ModelShape(
        family=family,
        num_layers=_whole(config, fields, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_whole(config, fields, "num_key_value_heads", heads),
        head_dim=_whole(config, fields, "head_dim", hidden // heads),
        ffn_size=_whole(config, fields, "intermediate_size", 4 * hidden),
        vocab_size=_whole(config, fields, "vocab_size"),
        max_positions=_max_positions(config, fields),
        norm_eps=1e-6,
        rope=Rope(10000.0),
        tied=head.weight is embedding.weight,
        qkv_bias=False,
        qk_norm=False,
        tensors=tuple((name, tuple(parameter.shape)) for name, parameter in model.named_parameters()),
        own_attention=own_attention,
    )


def _whole(config: Any, fields: Fields, name: str, default: int | None = None) -> int:
    value = getattr(config, name, None)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ModelFolderError(f"{fields.source}: {name} = {shown(value)} must be a whole number from 1")
    return value


def _max_positions(config: Any, fields: Fields) -> int:
    """Return the longest sequence that the rotary embedding gives the same frequencies, whatever stands beside it."""
    most = _whole(config, fields, "max_position_embeddings", 2**31)
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        if rope.get("rope_type") in _ROPE_BY_LENGTH:
            original = rope.get("original_max_position_embeddings")
            most = min(most, original or _whole(config, fields, "original_max_position_embeddings", most))
    return most


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary embeddings of a model: one, or one for each type of layers."""
    if isinstance(parameters, dict):
        yield parameters
        for inner in parameters.values():
            yield from _ropes(inner)


class InitialSource:
    """Draws weights as a model's own class initialises them, one module at a time. A value head is zero.

    Each module has a seed of its own, of the run's seed and its name, so that the weights are the same on every layout.
    """

    def __init__(self, folder: str | Path, seed: int) -> None:
        import torch

        self.seed, self._model = seed, empty_model(folder, torch.float32, None)
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along ``dim`` of the tensor drawn for ``name``."""
        import torch

        if name == VALUE_HEAD:
            return torch.zeros(1, self._model.config.hidden_size).narrow(dim, start, stop - start)
        owner, _, own_name = name.rpartition(".")
        if self._last[0] != owner:
            self._last = (owner, self._draw(owner))
        return self._last[1][own_name].narrow(dim, start, stop - start)

    def _draw(self, owner: str) -> dict[str, Tensor]:
        """Return what a module holds itself, by name."""
        import torch

        module = self._model.get_submodule(owner).to_empty(device="cpu", recurse=False)
        digest = hashlib.sha256(f"{self.seed}:{owner}".encode()).digest()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            for parameter in module.parameters(recurse=False):
                parameter.fill_(float("nan"))
            self._model._init_weights(module)
        drawn = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
        module.to_empty(device="meta", recurse=False)
        for name, tensor in drawn.items():
            if not tensor.isfinite().all():
                raise ModelFolderError(
                    f"{type(self._model).__name__} has no initial value for {owner}.{name}; give a folder with weights "
                    "and model.init=pretrained"
                )
        return drawn
