"""The text tower of a model of images and text, as a model of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from wpjax.checkpoints.convert import TensorSource
from wpjax.checkpoints.hf_config import transformers_config
from wpjax.errors import CheckpointError, ConfigError
from wpjax.models.families.vision_language import LEFT_OUT, TEXT_TOWERS, TOWER


def text_config(raw: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The configuration of the text tower, as its family writes it. None: the model has no other towers.

    Args:
        raw: the content of config.json.
        where: the file, for messages.

    Raises:
        ConfigError: transformers does not accept the configuration, or it says nothing of a text tower, or the tower is
            of a family that is not supported.

    >>> raw = {"model_type": "mistral3", "text_config": {"model_type": "mistral", "hidden_size": 32}}
    >>> text = text_config(raw, "config.json")
    >>> text["model_type"], text["hidden_size"]
    ('mistral', 32)
    """
    towers = TEXT_TOWERS.get(str(raw.get("model_type")))
    if towers is None:
        return None
    if not isinstance(raw.get("text_config"), Mapping) and "hidden_size" not in raw:  # older files have no text_config
        raise ConfigError(f"{where}: no text_config, so there is no text tower to read; download config.json again")
    whole = transformers_config(str(raw["model_type"]), raw, where)
    tower = whole.get_text_config()
    if tower.model_type not in towers:
        raise ConfigError(
            f"{where}: the text tower is of model_type {tower.model_type!r}; of a {raw['model_type']}, only "
            f"{', '.join(towers)} can be read"
        )
    text = tower.to_diff_dict()
    rope = text.get("rope_parameters")
    if isinstance(rope, dict):
        text["rope_parameters"] = {name: value for name, value in rope.items() if name != "mrope_section"}
    # These stand beside the towers, where they are given at all.
    beside = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "auto_map")
    text |= {name: raw[name] for name in beside if raw.get(name) is not None}
    return {**text, "model_type": towers[tower.model_type], "tie_word_embeddings": bool(whole.tie_word_embeddings)}


class TextTower:
    """The tensors of the text tower, under the names of its family: a `TensorSource`.

    Args:
        whole: the tensors of the whole model.

    Raises:
        CheckpointError: there are none of a text tower.
    """

    def __init__(self, whole: TensorSource):
        self.where, self.configuration = whole.where, whole.configuration
        self._whole = whole
        self._names: dict[str, str] = {}
        left_out: dict[str, int] = {}
        for name in whole.names():
            part = name.removeprefix("model.").split(".")[0]
            if part in LEFT_OUT:
                left_out[part] = left_out.get(part, 0) + 1
            else:
                self._names[name.replace(TOWER, "", 1)] = name
        self.left_out = tuple(f"{part} ({n} tensors)" for part, n in left_out.items())
        if not self._names:
            raise CheckpointError(
                f"{self.where}: no text tower, only {', '.join(self.left_out)}; a model of images alone says no next "
                "token, so name a model of text, or of images and text"
            )

    def names(self) -> list[str]:
        """The names of all tensors of the tower."""
        return list(self._names)

    def stored_name(self, name: str) -> str:
        """What a tensor of the tower is called in the whole model."""
        return self._names[name]

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._whole.read(self._names[name])
