"""Frozen backbones as feature maps: transformers folders, packaged models and ONNX files.

B rows, S tokens, D features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError, require
from .data.batch import padded
from .data.encode import encode
from .data.labels import Labels
from .models.load import load_model, load_tokenizer
from .specs import ModelSpec

POOLINGS = ("auto", "mean", "cls", "flatten")
TEXT, IMAGE = "sequence-classification", "image-classification"


@dataclass(frozen=True)
class Preprocessing:
    """What is done to inputs before the model sees them.

    Attributes:
        size: Height and width that images are resized to; empty leaves them alone.
        channels: Channels that the model takes; grey images are repeated. 0 leaves them alone.
        mean: Subtracted from each channel, on values from 0 to 1; empty for none.
        deviation: Divides each channel after that; empty for none.
        length: Most tokens of a text; the rest is cut off.
        declared: True if the model's folder says how it wants images.
    """

    size: tuple[int, ...] = ()
    channels: int = 0
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    length: int = 0
    declared: bool = False

    def images(self, pixels: Tensor) -> Tensor:
        """Resized, repeated to the model's channels and standardized. Shape (B, C, H, W)."""
        if self.channels and pixels.shape[1] != self.channels:
            if pixels.shape[1] != 1:
                raise DataError(
                    f"the images have {pixels.shape[1]} channels, the model takes {self.channels}",
                    "give images with that many channels, or grey ones",
                )
            pixels = pixels.expand(-1, self.channels, -1, -1)
        if self.size and tuple(pixels.shape[2:]) != self.size:
            pixels = torch.nn.functional.interpolate(
                pixels, size=self.size, mode="bilinear", align_corners=False, antialias=True
            )
        if self.mean:
            mean, deviation = (torch.tensor(v)[:, None, None] for v in (self.mean, self.deviation))
            pixels = (pixels - mean) / deviation
        return pixels


@dataclass
class Backbone:
    """A frozen model that turns rows into features.

    Attributes:
        place: Its folder, or an ONNX file.
        task: "sequence-classification" or "image-classification": which rows it reads.
        preprocessing: What is done to inputs.
        layer: Which hidden state; -1 is the last one, after the model's own final norm.
        pooling: "mean" over tokens or places, "cls" for the first token, "flatten" for all; "auto"
            takes what the model was made for.
        random_seed: Draw all weights anew from this seed: the control for what pre-training gave.
    """

    place: Path
    task: str
    preprocessing: Preprocessing
    layer: int = -1
    pooling: str = "auto"
    random_seed: int | None = None
    _loaded: tuple[Any, Any] | None = field(default=None, repr=False)

    def depends(self) -> dict[str, Any]:
        """What features depend on beside the model's files and the data."""
        return {
            "layer": self.layer, "pooling": self.pooling, "random_seed": self.random_seed,
            **asdict(self.preprocessing),
        }  # fmt: skip

    @property
    def is_onnx(self) -> bool:
        """True for an ONNX file."""
        return self.place.suffix == ".onnx"

    def load(self) -> tuple[Any, Any]:
        """The model in evaluation mode and its tokenizer (None for images), loaded once."""
        if self._loaded is None:
            if self.is_onnx and self.random_seed is not None:
                raise ConfigError(
                    "an ONNX file has no twin with random weights", "give a transformers folder"
                )
            if self.is_onnx:
                runtime: Any = require("onnxruntime", "onnx")
                options = runtime.SessionOptions()
                options.intra_op_num_threads = torch.get_num_threads()
                session = runtime.InferenceSession(
                    str(self.place), options, providers=["CPUExecutionProvider"]
                )
                tokenizer = load_tokenizer(self.place.parent) if self.task == TEXT else None
                self._loaded = session, tokenizer
            else:
                labels = Labels(("a", "b"))
                model, tokenizer = load_model(
                    ModelSpec(path=str(self.place)), self.task, labels,
                    length=self.preprocessing.length,
                )  # fmt: skip
                if self.random_seed is not None:
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(self.random_seed)
                        loaded: Any = model
                        model = type(loaded)(loaded.config)
                self._loaded = model.eval(), tokenizer
        return self._loaded

    def features(self, rows: Sequence[Any], batch_size: int = 64) -> Iterator[np.ndarray]:
        """Features of rows as `data.load` gives them, batch by batch. Shape (B, D) float32.

        Raises:
            ConfigError: If layer or pooling does not exist for this model.
            DataError: If images do not go into the model.
        """
        _, tokenizer = self.load()
        plain = [{k: v for k, v in row.items() if k != "label"} for row in rows]
        for start in range(0, len(plain), batch_size):
            chunk = plain[start : start + batch_size]
            if self.task == IMAGE:
                stacked = torch.from_numpy(np.stack([row["pixel_values"] for row in chunk]))
                inputs = {"pixel_values": self.preprocessing.images(stacked)}
            else:
                examples = encode(chunk, TEXT, tokenizer, self.preprocessing.length)
                batch = padded(examples, getattr(tokenizer, "pad_token_id", None) or 0)
                inputs = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
            with torch.inference_mode():
                states = self._onnx(inputs) if self.is_onnx else self._states(inputs)
                pooled = self._pooled(states, inputs.get("attention_mask"))
            yield pooled.float().numpy()

    def _states(self, inputs: dict[str, Tensor]) -> Tensor:
        model, _ = self.load()
        body = getattr(model, model.base_model_prefix, model)
        if getattr(model.config, "is_encoder_decoder", False):
            body = body.get_encoder()
        if model.config.model_type == "outlay_convnet":
            pooled, states = body(inputs["pixel_values"])
            return pooled if self.layer == -1 else self._chosen(states)
        outputs = body(**inputs, output_hidden_states=self.layer != -1)
        if self.layer == -1:
            return outputs.last_hidden_state
        return self._chosen(outputs.hidden_states)

    def _chosen(self, states: Sequence[Tensor]) -> Tensor:
        if not -len(states) <= self.layer < len(states):
            raise ConfigError(
                f"layer = {self.layer}, and the model has {len(states)} hidden states",
                f"give {-len(states)} to {len(states) - 1}",
            )
        return states[self.layer]

    def _onnx(self, inputs: dict[str, Tensor]) -> Tensor:
        session, _ = self.load()
        if self.layer != -1:
            raise ConfigError(
                f"layer = {self.layer}, and an ONNX file has its outputs only",
                "leave the layer out, or export the model with that output first",
            )
        wanted = [node.name for node in session.get_inputs()]
        given = {name: value.numpy() for name, value in inputs.items() if name in wanted}
        if "token_type_ids" in wanted and "token_type_ids" not in given:
            given["token_type_ids"] = np.zeros_like(given["input_ids"])
        if len(wanted) == 1 and self.task == IMAGE:
            given = {wanted[0]: inputs["pixel_values"].numpy()}
        missing = [name for name in wanted if name not in given]
        if missing:
            raise ConfigError(
                f"the ONNX file wants an input {missing[0]!r}",
                "export it with input_ids and attention_mask, or with one image",
            )
        return torch.from_numpy(session.run(None, given)[0])

    def _pooled(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """One vector a row. Shape (B, D)."""
        how = self.pooling
        if states.ndim == 2:
            return states
        if how == "flatten":
            return states.flatten(1)
        if states.ndim == 4:  # B x channels x height x width
            if how == "cls":
                raise ConfigError("this model has no class token", 'give pooling "mean"')
            return states.mean((2, 3))
        if how == "auto":
            how = "cls" if self.task == IMAGE and self._has_class_token() else "mean"
        if how == "cls":
            if self.task == IMAGE and not self._has_class_token():
                raise ConfigError("this model has no class token", 'give pooling "mean"')
            return states[:, 0]
        if mask is None:
            return states.mean(1)
        weights = mask.to(states.dtype)[..., None]
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)

    def _has_class_token(self) -> bool:
        model, _ = self.load()
        return not self.is_onnx and any(
            n.endswith("cls_token") for n, _ in model.named_parameters()
        )


def open_backbone(
    model: str, layer: int = -1, pooling: str = "auto", length: int = 128
) -> Backbone:
    """Find a model and read how it wants its inputs; weights are not read yet.

    Args:
        model: A transformers folder, a packaged model's name, or an ONNX file. Beside an ONNX file
            a tokenizer makes it a text model; preprocessor_config.json says how it wants images.
        layer: Which hidden state.
        pooling: How tokens or places become one vector.
        length: Most tokens of a text.

    Raises:
        ConfigError: If there is no such model.
        MissingAsset: If a packaged model is not installed.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling = {pooling!r} is not allowed", f"give {', '.join(POOLINGS)}")
    place = Path(model).expanduser()
    if not place.exists():
        from .. import assets

        if model not in assets.names("model"):
            raise ConfigError(
                f"{model!r} is neither a folder, an ONNX file nor a packaged model",
                f"packaged models: {', '.join(assets.names('model'))}",
            )
        place = assets.model_folder(model)
    if place.is_file():
        if place.suffix != ".onnx":
            raise ConfigError(f"{str(place)!r} is no model", "give its folder, or an .onnx file")
        text = (place.parent / "tokenizer.json").is_file()
        found = _declared(place.parent, {})
        return Backbone(
            place, TEXT if text else IMAGE,
            Preprocessing(length=length) if text else found, layer, pooling,
        )  # fmt: skip
    config = _json(place / "config.json")
    if _reads_images(config.get("model_type", "")):
        return Backbone(place, IMAGE, _declared(place, config), layer, pooling)
    return Backbone(place, TEXT, Preprocessing(length=length), layer, pooling)


def _reads_images(model_type: str) -> bool:
    from transformers.models.auto import modeling_auto as auto

    images = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return model_type == "outlay_convnet" or model_type in images


def _declared(folder: Path, config: dict[str, Any]) -> Preprocessing:
    """How a folder's preprocessor_config.json and config.json want images."""
    contract = _json(folder / "preprocessor_config.json")
    size = contract.get("crop_size") or contract.get("size") or config.get("image_size") or ()
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    elif isinstance(size, int):
        size = (size, size)
    size = tuple(int(n) for n in size if n) if contract.get("do_resize", True) else ()
    standardized = bool(contract) and contract.get("do_normalize", True)
    mean = tuple(contract.get("image_mean") or ()) if standardized else ()
    return Preprocessing(
        size=size if len(size) == 2 else (),
        channels=int(config.get("num_channels") or len(mean)),
        mean=mean,
        deviation=tuple(contract.get("image_std") or (1.0,) * len(mean)) if mean else (),
        declared=bool(contract),
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
