"""Which decoders are supported, and the translation from and to Hugging Face's config.json.

A field that this decoder does not implement is accepted only where its value changes nothing; any other value is an
error, because a model that silently differs from its checkpoint is worse than one that refuses to load.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cai_fast.errors import InputError

# model_type -> (class prefix of `architectures`, defaults of transformers for fields that a config.json may omit)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 32}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 32, "head_dim": 128}),
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_HANDLED = {*_REQUIRED, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "model_type"}
_HANDLED |= {"max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "architectures"}
_HANDLED |= {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attention_bias", "mlp_bias"}
_HANDLED |= {"original_max_position_embeddings"}
# Fields that do not change the forward pass of a causal decoder: dtypes, tokens, generation, labels, book-keeping.
_PASSIVE = {"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "use_cache", "dtype"}
_PASSIVE |= {"torch_dtype", "transformers_version", "id2label", "label2id", "num_labels", "problem_type", "return_dict"}
_PASSIVE |= {"is_llama_config", "transformers.js_config", "tokenizer_class", "unsloth_fixed", "unsloth_version"}
_PASSIVE |= {"output_attentions", "output_hidden_states", "attn_implementation"}
# Fields whose listed values (besides None, False and empty) equal what the decoder does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, 0.0),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1, 1.0),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (True,),
}
_LARGEST = {
    "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 2**10,
    "num_attention_heads": 2**10, "num_key_value_heads": 2**10, "head_dim": 2**12, "max_position_embeddings": 2**31,
}  # fmt: skip
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
_YARN_OPTIONS = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base and scaling. `scaling` holds the numbers of `kind`, sorted by name."""

    theta: float = 10000.0
    kind: str = "default"  # default | linear | llama3 | yarn
    scaling: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Rope:
        """Read `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4)."""
        values = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(values, dict):
            raise InputError(f"config.json: rope_scaling {values!r:.80}; expected an object")
        values = dict(values)
        kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
        values.pop("type", None)
        theta = values.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
        if values.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
            raise InputError("config.json: rope partial_rotary_factor other than 1 is not supported")
        if not isinstance(kind, str) or kind not in _ROPE_KEYS:
            raise InputError(
                f"config.json: rope type {kind!r:.80} is not supported; supported: {', '.join(_ROPE_KEYS)}"
            )
        if kind in ("llama3", "yarn"):
            top = raw.get("original_max_position_embeddings")
            default = raw.get("max_position_embeddings")
            values.setdefault("original_max_position_embeddings", default)
            if top is not None:
                values["original_max_position_embeddings"] = top
        allowed = _ROPE_KEYS[kind] | (_YARN_OPTIONS if kind == "yarn" else set())
        unknown = sorted(set(values) - allowed) if kind != "default" else []
        missing = sorted(name for name in _ROPE_KEYS[kind] if values.get(name) is None)
        if unknown or missing:
            raise InputError(f"config.json: rope type {kind!r}: unsupported fields {unknown}, missing fields {missing}")
        if kind == "default":
            values = {}
        _check_rope(kind, theta, values)
        return cls(float(theta), kind, tuple(sorted(values.items())))

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` entry of config.json."""
        return {"rope_type": self.kind, "rope_theta": self.theta, **dict(self.scaling)}


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a decoder. Sizes in elements, lengths and windows in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()  # empty: every layer, if sliding_window is set
    kept: tuple[tuple[str, Any], ...] = ()  # token ids and initializer_range, written back on save

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads or self.head_dim % 2 or self.head_dim < 1:
            raise InputError(
                f"config.json: {self.num_heads} attention heads, {self.num_kv_heads} key-value heads, head_dim "
                f"{self.head_dim}; the heads must be a multiple of the key-value heads and head_dim even"
            )

    def window(self, layer: int) -> int | None:
        """Tokens that a position of `layer` sees, itself included; None = all before it."""
        if self.sliding_window is None or (self.sliding_layers and not self.sliding_layers[layer]):
            return None
        return self.sliding_window

    @property
    def max_window(self) -> int | None:
        """The smallest window of any layer; None if every layer is full attention."""
        return None if all(self.window(i) is None for i in range(self.num_layers)) else self.sliding_window

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """Translate a config.json; an unknown family, an unhandled field or a missing one is an InputError."""
        kind = raw.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            supported = ", ".join(FAMILIES)
            raise InputError(f"config.json: model_type {kind!r:.80} is not supported; supported families: {supported}")
        check_fields(raw)
        values = {**FAMILIES[kind][1], **raw}
        heads = values["num_attention_heads"]
        bias = bool(values.get("attention_bias")) and kind in ("llama", "qwen3")
        window, layers = _sliding(kind, values)
        return cls(
            model_type=kind,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            max_position_embeddings=values.get("max_position_embeddings") or 2048,
            rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            rope=Rope.from_hf(raw),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=bias or kind == "qwen2",
            o_bias=bias,
            mlp_bias=bool(values.get("mlp_bias")) and kind == "llama",
            qk_norm=kind == "qwen3",
            sliding_window=window,
            sliding_layers=layers,
            kept=tuple((name, raw[name]) for name in _KEPT if raw.get(name) is not None),
        )

    def to_hf(self, head: str) -> dict[str, Any]:
        """The config.json of a model with this `head`: "lm" or "score" (one label)."""
        task = {"lm": "ForCausalLM", "score": "ForSequenceClassification"}[head]
        out: dict[str, Any] = {
            "architectures": [FAMILIES[self.model_type][0] + task],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope.to_hf(),
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_dropout": 0.0,
        }
        if self.model_type in ("llama", "qwen3"):
            out["attention_bias"] = self.o_bias
        if self.model_type == "llama":
            out["mlp_bias"] = self.mlp_bias
        if self.model_type == "mistral":
            out["sliding_window"] = self.sliding_window
        if self.model_type in ("qwen2", "qwen3"):
            out["use_sliding_window"] = self.sliding_window is not None
            out["sliding_window"] = self.sliding_window
            sliding = [self.window(i) is not None for i in range(self.num_layers)]
            out["layer_types"] = ["sliding_attention" if s else "full_attention" for s in sliding]
        if head == "score":
            out.update(num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
        return out | dict(self.kept)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def check_fields(raw: dict[str, Any]) -> None:
    """Refuse missing fields, and fields whose value the decoder does not implement."""
    for name, largest in _LARGEST.items():
        value = raw.get(name)
        if name not in _REQUIRED and value is None:
            continue
        if type(value) is not int or not 1 <= value <= largest:
            found = f"is {value!r:.80}" if value is not None else "missing"
            raise InputError(f"config.json: {name} {found}; expected a whole number from 1 to {largest}")
    for name in _SWITCHES:
        if not isinstance(raw.get(name), bool | None):
            raise InputError(f"config.json: {name} is {raw[name]!r:.80}; expected true or false")
    if not _is_number(raw.get("rms_norm_eps", 1e-6), 1):
        raise InputError(f"config.json: rms_norm_eps is {raw['rms_norm_eps']!r:.80}; expected a number in (0, 1)")
    for name, value in raw.items():
        if name in _HANDLED or name in _PASSIVE or name.startswith("_") or value in (None, False, {}, []):
            continue
        if name in _NEUTRAL and value in _NEUTRAL[name]:
            continue
        expected = f"; supported: {_NEUTRAL[name][0]!r}" if name in _NEUTRAL else "; this field is not supported"
        families = ", ".join(FAMILIES)
        raise InputError(f"config.json: {name[:80]} = {value!r:.80}{expected} (supported: plain {families} decoders)")
    if raw.get("attention_bias") and raw["model_type"] in ("mistral", "qwen2"):
        raise InputError(f"config.json: attention_bias is not a field of {raw['model_type']}")
    if raw.get("mlp_bias") and raw["model_type"] != "llama":
        raise InputError(f"config.json: mlp_bias is not a field of {raw['model_type']}")


def _is_number(value: Any, largest: float = 2**63) -> bool:
    """Whether `value` is a number in (0, largest)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < largest


def _check_rope(kind: str, theta: Any, values: dict[str, Any]) -> None:
    """Refuse numbers with which the frequencies of a rope type are not defined."""
    if not _is_number(theta) or theta <= 1:
        raise InputError(f"config.json: rope_theta is {theta!r:.80}; expected a number above 1")
    for name, value in values.items():
        if (name in _YARN_OPTIONS and value is None) or (name.startswith("mscale") and value == 0):
            continue
        if not (isinstance(value, bool) if name == "truncate" else _is_number(value)):
            raise InputError(f"config.json: {name} of rope type {kind!r} is {value!r:.80}; expected a positive number")
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise InputError("config.json: low_freq_factor of rope type 'llama3' must be below high_freq_factor")


def _sliding(kind: str, values: dict[str, Any]) -> tuple[int | None, tuple[bool, ...]]:
    """(window, which layers slide) of a config; the tuple is empty where all layers are alike."""
    window = values.get("sliding_window")
    if kind == "llama" or (kind != "mistral" and not values.get("use_sliding_window")):
        window = None  # transformers ignores the number there
    types = values.get("layer_types")
    count = values["num_hidden_layers"]
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != count or not all(name in known for name in types):
            raise InputError(f"config.json: layer_types {types!r:.80}; expected {count} of {'|'.join(known)}")
        if kind in ("llama", "mistral"):
            uniform = "full_attention" if window is None else "sliding_attention"
            if set(types) != {uniform}:
                raise InputError(f"config.json: layer_types of a {kind} model must all be {uniform}")
    if window is None:
        if types is not None and "sliding_attention" in types:
            raise InputError("config.json: layer_types names sliding_attention but no sliding window is in use")
        return None, ()
    if type(window) is not int or not 1 <= window < 2**63:
        raise InputError(f"config.json: sliding_window {window!r:.80}; expected a positive number of tokens or null")
    if kind == "mistral":
        return window, ()
    if types is None:
        first = values.get("max_window_layers", 28)
        if type(first) is not int:
            raise InputError(f"config.json: max_window_layers {first!r:.80}; expected a whole number")
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    layers = tuple(t == "sliding_attention" for t in types)
    return (window, layers) if any(layers) else (None, ())
