"""What a Hugging Face config.json says of a model: its family, sizes and rotary embedding. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megarl.errors import ModelFolderError
from megarl.weights.config_fields import Fields, read_json, shown
from megarl.weights.folder import expanded

FAMILIES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
)
# What config.json calls a family in its model_type. Another one has other defaults, in transformers and in vLLM.
_MODEL_TYPES = MappingProxyType(
    dict(zip(FAMILIES, ("llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "mixtral"), strict=True))
)
# Key-value heads of a config.json that doesn't name them, by transformers' classes; Llama has as many as heads.
_KV_HEADS = MappingProxyType(
    {
        "Qwen2ForCausalLM": 32,
        "Qwen3ForCausalLM": 32,
        "Qwen2MoeForCausalLM": 16,
        "Qwen3MoeForCausalLM": 4,
        "MixtralForCausalLM": 8,
    }
)
# Fields that change the mathematics, in transformers or in vLLM, and the values at which they don't. Not among them are
# attention_dropout (log-probs are those without), pretraining_tp (the same product in parts) and losses of the router.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "bias": (False,),  # vLLM's word for attention_bias in Llama
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "attention_chunk_size": (),
        "dual_chunk_attention_config": (),
        "is_causal": (True,),
        "is_encoder_decoder": (False,),
        "partial_rotary_factor": (1,),
        "logit_scale": (1,),
        "router_jitter_noise": (0,),
        "per_layer_config": (),
    }
)
_ROPE_FIELDS = frozenset(
    {
        *("rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor"),
        *("original_max_position_embeddings", "partial_rotary_factor"),
    }
)
# Far above any model's, and small enough that counting what a model has takes no second.
_MOST_LAYERS, _MOST_EXPERTS, _MOST_EXPERTS_IN_ALL = 2048, 8192, 2**16
_MOST_WIDE, _MOST_HEADS, _MOST_TOKENS, _MOST_POSITIONS = 2**22, 2**14, 2**26, 2**31
# What transformers calls a family's language model, and its models with a number a token, as a critic is, or a number
# for a whole text, as a reward model is.
VALUE_HEAD = "score.weight"  # as transformers' classification models name it
_LANGUAGE_MODEL, CRITIC, REWARD_MODEL = "ForCausalLM", "ForTokenClassification", "ForSequenceClassification"
CLASSIFIERS = (CRITIC, REWARD_MODEL)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. kind: ``default``, ``linear`` or ``llama3``; the factors are unused where kind is default."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelShape:
    """Everything about an architecture that decides parameters and mathematics.

    value_head: one number a token in place of logits, as a critic and a reward model have.

    num_experts: of every layer but ``dense_layers``; 0 in a dense model, where nothing else about experts means
    anything. A token takes ``experts_per_token`` of them, weighted by its router's ``router_score``, which are divided
    by their sum where ``norm_topk_prob``. A shared expert, which every token takes besides, is weighted by the sigmoid
    of a gate of its own where ``gated_shared_expert``; shared_expert_ffn_size is 0 where there is none.
    ffn_size: of dense layers.

    tensors: of a family that the name map doesn't have, the name and size of everything in its state dict; then they
    say all about its parameters, and what is said of norms, biases and the rotary embedding means nothing.
    own_attention: such a model attends in a way of its own, over one sequence a line.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    init_std: float = 0.02
    value_head: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    shared_expert_ffn_size: int = 0
    gated_shared_expert: bool = False
    norm_topk_prob: bool = False
    router_score: str = "softmax"
    dense_layers: tuple[int, ...] = ()
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    own_attention: bool = False

    @property
    def is_mapped(self) -> bool:
        """Whether the name map has the family."""
        return not self.tensors

    def with_value_head(self) -> ModelShape:
        """Return a critic's or reward model's shape: no output layer, so nothing to tie the embedding to."""
        kept = tuple(tensor for tensor in self.tensors if not tensor[0].startswith("lm_head."))
        head = () if self.is_mapped else ((VALUE_HEAD, (1, self.hidden_size)),)
        return self if self.value_head else replace(self, value_head=True, tied=False, tensors=kept + head)

    @property
    def critic_architecture(self) -> str:
        """What a critic of this family is called in config.json."""
        return self.family.removesuffix(_LANGUAGE_MODEL).removesuffix("LMHeadModel") + CRITIC

    def critic_fields(self) -> dict[str, Any]:
        """Return the fields of config.json that say of a folder that it has a value head."""
        assert self.value_head
        return {
            "architectures": [self.critic_architecture],
            "id2label": {"0": "value"},
            "label2id": {"value": 0},
            "tie_word_embeddings": False,
        }

    def has_experts(self, layer: int) -> bool:
        """Return True for a ``layer`` that is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes through, without the embedding."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        total = 0
        for layer in range(self.num_layers):
            if self.has_experts(layer):
                ffn = self.experts_per_token * self.expert_ffn_size + self.shared_expert_ffn_size
            else:
                ffn = self.ffn_size
            total += attention + 3 * self.hidden_size * ffn
        return total + self.hidden_size * (1 if self.value_head else self.vocab_size)

    def padded_vocab(self, tp: int) -> int:
        """Return the vocabulary rounded up to a multiple of ``tp``."""
        return -(-self.vocab_size // tp) * tp


def read_model_shape(folder: str | Path, key: str = "model.path") -> ModelShape:
    """Read ``folder``/config.json and return its ModelShape. key: what names the folder, for the error.

    Raises ModelFolderError where the file is absent or broken, or the architecture is not one of FAMILIES.
    """
    path, config = read_config(folder, key)
    return parse_model_shape(config, str(path))


def read_config(folder: str | Path, key: str) -> tuple[Path, dict[str, Any]]:
    """Return the path of ``folder``/config.json and its fields; raises ModelFolderError where there are none."""
    path = expanded(folder, key) / "config.json"
    if not path.is_file():
        found = "no config.json in this folder" if path.parent.is_dir() else "no such folder"
        raise ModelFolderError(
            f"{key} = {str(folder)!r}: {found}; "
            "give a Hugging Face model folder (config.json, tokenizer files, *.safetensors)"
        )
    config = read_json(path, "config.json of a model")
    if not isinstance(config, dict):
        raise ModelFolderError(f"{path} holds no fields: it must be a JSON object")
    return path, config


def parse_model_shape(config: Mapping[str, Any], source: str) -> ModelShape:
    """Turn the fields of a config.json into a ModelShape; ``source`` names it in errors.

    A token classification model of a supported family is a critic, if it has one label, and a sequence classification
    model a reward model. Raises ModelFolderError for a field that is missing, not what it must be, or has a value that
    would change the mathematics unseen.
    """
    fields = Fields(config, source)
    architecture, family = architecture_of(fields)
    if family not in FAMILIES:
        raise ModelFolderError(
            f"{source}: architecture {shown(architecture)} is not supported; supported are {', '.join(FAMILIES)}, and "
            "on FSDP (--config-name=ppo_trainer, or strategy=fsdp2) causal language models of transformers"
        )
    has_value_head = architecture != family
    if has_value_head:
        check_labels(architecture, fields)
    _refuse_unsupported(family, fields)
    heads, kv_heads, head_dim = _heads(family, fields)
    return ModelShape(
        family=family,
        num_layers=fields.whole("num_hidden_layers", 1, _MOST_LAYERS),
        hidden_size=fields.whole("hidden_size", 1, _MOST_WIDE),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=fields.whole("intermediate_size", 1, _MOST_WIDE),
        vocab_size=fields.whole("vocab_size", 1, _MOST_TOKENS),
        max_positions=fields.whole("max_position_embeddings", 1, _MOST_POSITIONS),
        norm_eps=fields.number("rms_norm_eps", 0, 1, 1e-5 if family == "MixtralForCausalLM" else 1e-6),
        rope=_rope(family, fields),
        tied=fields.flag("tie_word_embeddings", False) and not has_value_head,
        qkv_bias=family == "Qwen2ForCausalLM" or (family == "Qwen2MoeForCausalLM" and fields.flag("qkv_bias", True)),
        qk_norm=family.startswith("Qwen3"),
        init_std=fields.number("initializer_range", 0, 10, 0.02),
        value_head=has_value_head,
        **_experts(family, fields),
    )


def architecture_of(fields: Fields) -> tuple[str, str]:
    """Return the architecture that a config.json names, and that of the language model that it was made from."""
    architecture = (*fields.items("architectures", str, "texts"), "(none)")[0]
    return architecture, architecture.replace(CRITIC, _LANGUAGE_MODEL).replace(REWARD_MODEL, _LANGUAGE_MODEL)


def check_labels(architecture: str, fields: Fields) -> None:
    """Refuse a classifier of several labels."""
    labels = len(fields.inner("id2label").values) or fields.whole("num_labels", 0, _MOST_TOKENS, 2)
    if labels != 1:  # transformers has two labels unless told
        role = "critic" if architecture.endswith(CRITIC) else "reward model"
        raise ModelFolderError(f"{fields.source}: {architecture} must have one label to be a {role}, see id2label")


def _heads(family: str, fields: Fields) -> tuple[int, int, int]:
    """Return the heads, the key-value heads and the size of a head, as transformers has them where none is named."""
    hidden, heads = fields.whole("hidden_size", 1, _MOST_WIDE), fields.whole("num_attention_heads", 1, _MOST_HEADS)
    kv_heads = fields.whole("num_key_value_heads", 1, _MOST_HEADS, _KV_HEADS.get(family, heads))
    if heads % kv_heads:
        raise ModelFolderError(
            f"{fields.source}: num_key_value_heads = {kv_heads} must divide num_attention_heads = {heads}"
        )
    is_given = "head_dim" in fields or family == "Qwen3ForCausalLM"
    if hidden % heads and not (is_given and family != "LlamaForCausalLM"):
        raise ModelFolderError(f"{fields.source}: num_attention_heads = {heads} must divide hidden_size = {hidden}")
    head_dim = fields.whole("head_dim", 1, _MOST_HEADS, 128 if is_given else hidden // heads)
    if head_dim % 2:
        raise ModelFolderError(f"{fields.source}: head_dim = {head_dim} must be even, for a rotary embedding")
    return heads, kv_heads, head_dim


def _experts(family: str, fields: Fields) -> dict[str, Any]:
    """Return ModelShape's fields about experts; none for a family without."""
    if "Moe" not in family and family != "MixtralForCausalLM":
        return {}
    # transformers 5 writes Mixtral's word for Qwen3's experts as well.
    words = [word for word in ("num_local_experts", "num_experts") if word in fields] or ["num_experts"]
    num_experts, *other = (fields.whole(word, 1, _MOST_EXPERTS) for word in words)
    if other and other[0] != num_experts:
        fields.refuse("num_experts", f"contradicts num_local_experts = {num_experts}; correct one of them")
    num_layers = fields.whole("num_hidden_layers", 1, _MOST_LAYERS)
    if num_layers * num_experts > _MOST_EXPERTS_IN_ALL:
        fields.refuse(words[0], f"x num_hidden_layers = {num_layers} must be at most {_MOST_EXPERTS_IN_ALL:,}")
    per_token = fields.whole("num_experts_per_tok", 0, _MOST_EXPERTS)
    if not 1 <= per_token <= num_experts:
        fields.refuse("num_experts_per_tok", f"must be from 1 to the model's {num_experts} experts")
    found: dict[str, Any] = {"num_experts": num_experts, "experts_per_token": per_token}
    if family == "MixtralForCausalLM":
        found["expert_ffn_size"] = fields.whole("intermediate_size", 1, _MOST_WIDE)
        found["norm_topk_prob"] = True
    else:
        step = fields.whole("decoder_sparse_step", 1, 2**31, 1)
        listed = frozenset(fields.items("mlp_only_layers", int, "layers, counted from 0"))
        found["expert_ffn_size"] = fields.whole("moe_intermediate_size", 1, _MOST_WIDE)
        found["norm_topk_prob"] = fields.flag("norm_topk_prob", False)
        found["dense_layers"] = tuple(i for i in range(num_layers) if i in listed or (i + 1) % step)
    if family == "Qwen2MoeForCausalLM":
        found["shared_expert_ffn_size"] = fields.whole("shared_expert_intermediate_size", 1, _MOST_WIDE)
        found["gated_shared_expert"] = True
    if per_token == 1 and found["norm_topk_prob"]:
        raise ModelFolderError(
            f"{fields.source}: num_experts_per_tok = 1 with norm_topk_prob is not supported: every expert's weight "
            "would be 1, and the router would learn nothing"
        )
    return found


def _refuse_unsupported(family: str, fields: Fields) -> None:
    """Refuse what would change the mathematics unseen."""
    for field, allowed in _NEUTRAL.items():
        fields.only(field, allowed)
    fields.only("model_type", (_MODEL_TYPES[family],))
    if family in ("LlamaForCausalLM", "MixtralForCausalLM"):  # others ask use_sliding_window first
        fields.only("sliding_window", ())
    if family == "Qwen2ForCausalLM":
        fields.only("qkv_bias", (True,))
    if not family.startswith("Qwen3"):
        fields.only("qk_norm", (False,))
    layers = fields.whole("num_hidden_layers", 1, _MOST_LAYERS)
    if "layer_types" in fields and fields.items("layer_types", str, "texts") != ("full_attention",) * layers:
        fields.refuse("layer_types", f"is not supported, only 'full_attention' for each of the {layers} layers")
    refuse_quantized(fields)


def refuse_quantized(fields: Fields) -> None:
    """Refuse a model whose weights have scales beside them."""
    for field in ("quantization_config", "compression_config"):
        if field in fields:
            raise ModelFolderError(
                f"{fields.source}: {field} is there, but quantized weights can't be trained; give the unquantized model"
            )


def _rope(family: str, fields: Fields) -> Rope:
    """Read rope_parameters (transformers 5) or rope_theta with rope_scaling (before)."""
    new, old = fields.inner("rope_parameters"), fields.inner("rope_scaling")
    if new.values and old.values and new.values != old.values:
        fields.refuse("rope_scaling", "contradicts rope_parameters; keep one of them")
    rope = new if new.values else old
    for name in rope.values:
        if name not in _ROPE_FIELDS:
            rope.refuse(name, f"is not supported; supported are {', '.join(sorted(_ROPE_FIELDS))}")
    rope.only("partial_rotary_factor", (1,))
    default = fields.number("rope_theta", 0, 1e15, 1e6 if family == "MixtralForCausalLM" else 10000.0, above=True)
    theta = rope.number("rope_theta", 0, 1e15, default, above=True)
    kind = rope.word("rope_type", rope.word("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "llama3"):
        raise ModelFolderError(
            f"{fields.source}: rope type {shown(kind)} is not supported; supported are default, linear, llama3"
        )
    factor = rope.number("factor", 0, 1e6, above=True)
    if kind == "linear":
        return Rope(theta, kind, factor)
    low, high = (rope.number(f"{end}_freq_factor", 0, 1e6, above=True) for end in ("low", "high"))
    if high <= low:
        rope.refuse("high_freq_factor", f"must be above low_freq_factor = {low:g}")
    return Rope(theta, kind, factor, low, high, rope.whole("original_max_position_embeddings", 1, _MOST_POSITIONS))
