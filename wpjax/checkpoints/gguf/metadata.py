"""The metadata of a GGUF file: named numbers, texts and lists."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from wpjax.checkpoints.folder import check_file
from wpjax.errors import CheckpointError, ConfigError, WpjaxError


def open_gguf(path: Path) -> Any:
    """The file as a reader of the package gguf.

    Raises:
        CheckpointError: the file is damaged.
        WpjaxError: the extra `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise WpjaxError(f"{path}: reading GGUF needs an extra; pip install 'wpjax[gguf]'") from error

    class Reader(gguf.GGUFReader):
        # As the package's own, but several times as fast, which a vocabulary of 262,144 tokens shows; and it raises
        # at the end of the file. The package would read nothing there, and go on for as long as a damaged length says.
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            order = self.byte_order if override_order is None else override_order
            return np.frombuffer(self.data, np.dtype(dtype).newbyteorder(order), int(count), int(offset))

    check_file(path)
    try:
        return Reader(path)
    except Exception as error:  # whatever the reader raises at a damaged file
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not a readable GGUF file ({reason}); download it again") from error


class Metadata:
    """Entries of the metadata, checked as they are read.

    Args:
        reader: a reader of the package gguf.
        where: the file, for messages.
        ignore: names of entries that are as if they were not there.
    """

    def __init__(self, reader: Any, where: str, ignore: frozenset[str] = frozenset()):
        self.where = where
        self._reader = reader
        self._ignore = ignore

    def names(self) -> list[str]:
        """The names of all entries."""
        return [name for name in self._reader.fields if name not in self._ignore]

    def get(self, name: str) -> Any:
        """An entry; None if there is none of that name.

        Raises:
            CheckpointError: it cannot be read.
        """
        field = None if name in self._ignore else self._reader.get_field(name)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError, TypeError) as error:  # ValueError: text that is not UTF-8
            raise CheckpointError(f"{self.where}: {name} cannot be read ({error}); download the file again") from error

    def needed(self, name: str) -> Any:
        """An entry that must be there.

        Raises:
            CheckpointError: it is not, or cannot be read.
        """
        value = self.get(name)
        if value is None:
            raise CheckpointError(f"{self.where}: the metadata lacks {name}; convert or download the file again")
        return value

    def number(self, name: str, default: float | None = None) -> Any:
        """An entry that must be a finite number.

        A float32 comes as the shortest decimal that means it: 1e-05, not 9.99999974e-06.

        Args:
            name: of the entry.
            default: the value if there is none; without a default it must be there.

        Raises:
            CheckpointError: it is not there, or cannot be read.
            ConfigError: it is no number.
        """
        value = self.needed(name) if default is None else self.get(name)
        if value is None:
            return default
        number = shortest(value) if isinstance(value, float) else value
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            text = " ".join(str(value).split())[:60]
            raise ConfigError(f"{self.where}: {name}={text} is not a number; only one number is implemented")
        return number

    def size(self, name: str, default: int | None = None) -> int:
        """An entry that must be a positive integer; otherwise as `number`."""
        value = self.number(name, default)
        if not (isinstance(value, int) and 1 <= value < 2**31):
            raise ConfigError(f"{self.where}: {name}={value!r} is not a size; convert or download the file again")
        return value

    @functools.cached_property
    def tokens(self) -> list[str]:
        """The vocabulary, by id."""
        tokens = self.needed("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise CheckpointError(f"{self.where}: tokenizer.ggml.tokens is not a list of text; download the file again")
        return tokens

    def token_id(self, kind: str) -> int | None:
        """The id of a special token ("bos", "eos", "eot", "unknown" or "padding"); None if the file names none.

        Raises:
            CheckpointError: it is not the id of a token.
        """
        key = f"tokenizer.ggml.{kind}_token_id"
        value = self.get(key)
        if value is not None and not (isinstance(value, int) and 0 <= value < len(self.tokens)):
            raise CheckpointError(f"{self.where}: {key}={value} is not the id of one of its {len(self.tokens)} tokens")
        return value


def shortest(value: float) -> float:
    """The shortest decimal among the numbers that are equal in float32.

    >>> import numpy as np
    >>> shortest(float(np.float32(0.1)))
    0.1
    """
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
