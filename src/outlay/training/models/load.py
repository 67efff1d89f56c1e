"""Models: local transformers folders, packaged ones, and small ones from scratch.

Only config.json, safetensors and the tokenizer's files are read; no code of a model folder runs
and nothing is looked for on a network. Weights are float32 unless the run's precision is
float64. Whatever is drawn at random comes from (seed, name): the global generator is left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...core.errors import ConfigError
from ...core.method import seed_of
from ...nn.targets import head_modules
from ..data.labels import Labels
from ..specs import IMAGES, MASKED_IMAGES, MASKED_TEXT, ModelSpec
from .export import fingerprint, save_model
from .heads import fit_head, fresh_parameters, scale_head, start_at_mean
from .quiet import quiet_transformers
from .scratch import scratch_config
from .tokens import (
    byte_tokenizer,
    grow_rows,
    grow_tokens,
    load_tokenizer,
    token_bytes,
    with_padding,
)

__all__ = [
    "byte_tokenizer", "fingerprint", "grow_rows", "grow_tokens", "load_model", "load_tokenizer",
    "patches_of", "save_model", "scale_head", "token_bytes", "with_padding",
]  # fmt: skip

_PROBLEM = {
    "sequence-classification": "single_label_classification",
    "image-classification": "single_label_classification",
    "multi-label-classification": "multi_label_classification",
    "regression": "regression",
}
_AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "multi-label-classification": "AutoModelForSequenceClassification",
    "causal-language-modeling": "AutoModelForCausalLM",
    "sequence-to-sequence": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    MASKED_TEXT: "AutoModelForMaskedLM",
    MASKED_IMAGES: "AutoModelForMaskedImageModeling",
}


def load_model(
    spec: ModelSpec,
    task: str,
    labels: Labels | None = None,
    *,
    tokenizer: Any = None,
    added: Sequence[str] = (),
    seed: int = 0,
    precision: str = "float32",
    length: int = 512,
    meta: bool = False,
    base: Path | None = None,
) -> tuple[nn.Module, Any]:
    """A model with the task's head, and its tokenizer.

    Args:
        spec: Which model.
        task: One of `recipe.TASKS`.
        labels: Label space: size and names of the head, target scales, image shape.
        tokenizer: Used in place of the model's own.
        added: Tokens that the tokenizer has beyond the model's own; they get rows here, drawn
            from (seed, token).
        seed: Seed of the head, and of every weight of a model from scratch.
        precision: Weights are float64 for "float64", float32 otherwise.
        length: Longest row in tokens; a model with fewer positions is refused.
        meta: Build on the meta device: shapes and names, no weights.
        base: Folder that relative paths start from.

    Returns:
        The model in training mode and the tokenizer (None for images).

    Raises:
        ConfigError: If the folder, the task and the settings do not go together.
        MissingAsset: If a packaged model is not installed.
    """
    labels = Labels() if labels is None else labels
    folder = _folder(spec, base)
    config = None if folder is None else _config(folder)
    if task not in IMAGES and tokenizer is None:
        tokenizer = _tokenizer(spec, folder, base)
    if config is None:
        config = scratch_config(spec, task, labels, tokenizer, length)
    config = _around_encoder(config, task)
    _check(config, task, labels, tokenizer, length, len(added))
    saved = dict(config.id2label or {})
    _settle(config, spec, task, labels, tokenizer)
    dtype = torch.float64 if precision == "float64" else torch.float32
    with quiet_transformers(), _seeded(seed):
        model = (
            _built(config, task, dtype, meta)
            if folder is None or meta
            else _read(folder, config, task, labels, dtype, seed, saved)
        )
    if folder is None and not meta:
        start_at_mean(model, labels)
    if added:
        grow_rows(model, tokenizer, added, seed)
    if spec.gradient_checkpointing:
        _checkpoint_gradients(model)
    return model.train(), tokenizer


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from (seed, "model") inside, and give the CPU's generator back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed_of(seed, "model"))
        yield


def _local(text: str, base: Path | None) -> Path:
    path = Path(text).expanduser()
    return (path if path.is_absolute() or base is None else base / path).resolve()


def _folder(spec: ModelSpec, base: Path | None) -> Path | None:
    if spec.asset is not None:
        from ...assets import model_folder

        return model_folder(spec.asset)
    return None if spec.path is None else _local(spec.path, base)


def _tokenizer(spec: ModelSpec, folder: Path | None, base: Path | None) -> Any:
    if spec.tokenizer is None:
        return byte_tokenizer(spec.config == "t5") if folder is None else load_tokenizer(folder)
    place = _local(spec.tokenizer, base)
    if not place.is_dir():
        from ... import assets

        if spec.tokenizer not in assets.available():
            raise ConfigError(
                f"model.tokenizer = {spec.tokenizer!r} is neither a folder nor a packaged model",
                f"give a folder, or one of {', '.join(assets.names('model'))}",
            )
        place = assets.model_folder(spec.tokenizer)
    return load_tokenizer(place)


def _config(folder: Path) -> Any:
    """The folder's config, after checking that its weights can be read safely."""
    from transformers import AutoConfig

    from . import convnet as _convnet  # noqa: F401 - registers its model type
    from . import masked_vit as _masked_vit  # noqa: F401

    if not folder.is_dir():
        raise ConfigError(
            f"model folder {str(folder)!r} "
            + ("is a file" if folder.exists() else "does not exist"),
            "give a local transformers folder, or {asset: NAME} for a packaged model",
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"model folder {str(folder)!r} holds an adapter, not a model",
            "give the model that it was made for",
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model folder {str(folder)!r} has no config.json",
            "save the model there with model.save_pretrained(folder)",
        )
    if not any(folder.glob("*.safetensors")):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        found = f"only pickled weights ({pickled[0].name})" if pickled else "no weights"
        raise ConfigError(
            f"model folder {str(folder)!r} has {found}; weights are read from safetensors alone",
            "load it where you trust it and call model.save_pretrained(folder)",
        )
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise ConfigError(
            f"{str(folder / 'config.json')!r} cannot be used ({_reason(error)})",
            "give a model that transformers knows without extra code",
        ) from None
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"model folder {str(folder)!r} holds quantized weights, which are not trained here",
            "give the model in float32, float16 or bfloat16",
        )
    return config


def patches_of(config: Any) -> int:
    """Patches of an image; 0 if the model does not cut images into patches."""
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if size is None or patch is None:
        return 0
    height, width = (size, size) if isinstance(size, int) else size
    tall, wide = (patch, patch) if isinstance(patch, int) else patch
    return (height // tall) * (width // wide)


def _around_encoder(config: Any, task: str) -> Any:
    """A ViT as a masked auto-encoder and the other way round, as the task wants it."""
    from .masked_vit import MaskedViTConfig, masked_config, plain_config

    if task == MASKED_IMAGES and config.model_type == "vit":
        return masked_config(config)
    if task != MASKED_IMAGES and isinstance(config, MaskedViTConfig):
        return plain_config(config)
    return config


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def _check(config: Any, task: str, labels: Labels, tokenizer: Any, length: int, added: int) -> None:
    """Refuse what would fail later, or train without a word on something else."""
    if task in _PROBLEM and not labels.names:
        raise ConfigError(f"{task} needs named labels", "load the data before the model")
    if task in IMAGES:
        size = getattr(config, "image_size", None)
        wanted = [size, size] if isinstance(size, int) else list(size or ())
        channels = getattr(config, "num_channels", None)
        if labels.image and wanted and (channels, *wanted) != labels.image:
            raise ConfigError(
                f"the images are {'x'.join(map(str, labels.image))}, "
                f"the model takes {'x'.join(map(str, (channels, *wanted)))}",
                "resize the images, or give a model of their size",
            )
        return
    encoder_only = not config.is_encoder_decoder and not getattr(config, "is_decoder", False)
    if task == "causal-language-modeling" and encoder_only and _sees_both_sides(config):
        raise ConfigError(
            f"{config.model_type!r} reads both sides of a token, so it cannot predict the next",
            "give a decoder (LLaMA- or GPT-2-shaped), or another task",
        )
    if task in _PROBLEM and config.is_encoder_decoder:
        # These heads read the state at the last end-of-text token of each row.
        end = getattr(config, "eos_token_id", None)
        if end is None or tokenizer("a")["input_ids"][-1:] != [end]:
            raise ConfigError(
                f"a {config.model_type!r} model needs rows that end in its end-of-text token for "
                f"{task}, and the tokenizer does not put it there",
                "give the tokenizer that belongs to the model",
            )
    size = getattr(config, "vocab_size", None)
    if size is not None and len(tokenizer) - added > size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer) - added:,} tokens, the model {size:,}",
            "raise model.vocabulary, or give the tokenizer that belongs to the model",
        )
    positions = getattr(config, "max_position_embeddings", None)
    rotary = any(getattr(config, k, None) for k in ("rope_parameters", "rope_theta"))
    # RoBERTa-like models count positions from the pad id on, which takes places away.
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    if positions and not rotary and length > positions - offset:
        raise ConfigError(
            f"batch.length = {length} exceeds the model's {positions - offset} positions",
            f"set batch.length to {positions - offset} or less",
        )


def _sees_both_sides(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return config.model_type in MASKED


def _settle(config: Any, spec: ModelSpec, task: str, labels: Labels, tokenizer: Any) -> None:
    """Write the task into the config: labels, pad token, dropout, no cache."""
    if task in _PROBLEM:
        config.num_labels = len(labels)
        config.id2label, config.label2id = labels.id2label, labels.label2id
        config.problem_type = _PROBLEM[task]
    if tokenizer is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    if getattr(config, "use_cache", None):
        config.use_cache = False
    if spec.dropout is not None:
        _set_dropout(config, spec.dropout)


def _set_dropout(config: Any, rate: float) -> None:
    """Set every dropout rate of a config and of the configs inside it; a None stays None."""
    from transformers import PreTrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _set_dropout(value, rate)
        elif ("dropout" in name or name.endswith("pdrop")) and type(value) in (int, float):
            setattr(config, name, rate)


def _auto(task: str, config: Any) -> Any:
    import transformers

    auto = getattr(transformers, _AUTO[task])
    if type(config) not in auto._model_mapping:
        raise ConfigError(
            f"a model of type {config.model_type!r} has no head for {task}",
            "give another model, or another task",
        )
    return auto


def _built(config: Any, task: str, dtype: torch.dtype, meta: bool) -> nn.Module:
    auto = _auto(task, config)
    with torch.device("meta") if meta else contextlib.nullcontext():
        return auto.from_config(config, dtype=torch.float32).to(dtype)


def _read(
    folder: Path,
    config: Any,
    task: str,
    labels: Labels,
    dtype: torch.dtype,
    seed: int,
    saved: dict[int, str],
) -> nn.Module:
    """Read the folder's weights; whatever it lacks must be the task's head."""
    auto = _auto(task, config)
    try:
        model, seen = auto.from_pretrained(
            str(folder), config=config, dtype=dtype, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:
        raise ConfigError(
            f"the weights in {str(folder)!r} cannot be read ({_reason(error)})",
            "save the model again with model.save_pretrained(folder)",
        ) from None
    missing = {str(name) for name in seen["missing_keys"]}
    misfit = {str(entry[0] if isinstance(entry, tuple) else entry)
              for entry in seen["mismatched_keys"]}  # fmt: skip
    heads = head_modules(model)
    if task == MASKED_TEXT:
        # Its output embedding is pre-trained, the layers before that may not be there.
        prefix = getattr(model, "base_model_prefix", "")
        heads = tuple(name for name, _ in model.named_children() if name != prefix)
    body = sorted(
        name
        for name in missing | misfit
        if name.split(".")[0] not in heads and (name in misfit or "pooler" not in name)
    )
    if body:
        raise ConfigError(
            f"the weights in {str(folder)!r} do not fit {type(model).__name__}: "
            f"{len(body)} tensors are missing or of another shape, first {body[0]!r}",
            "check that config.json and the weights belong together",
        )
    fresh_parameters(model, missing | misfit, seed)
    fit_head(model, task, labels, saved, missing | misfit, seed)
    return model


def _checkpoint_gradients(model: nn.Module) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing",
            "set model.gradient_checkpointing to false",
        )
    # The name changed within the versions of transformers that are supported.
    name = "activation_checkpointing_enable"
    name = name if hasattr(model, name) else "gradient_checkpointing_enable"
    getattr(model, name)({"use_reentrant": False})
