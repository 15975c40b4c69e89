"""YAML files that users write, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from wpjax.errors import WpjaxError


class _Loader(yaml.SafeLoader):
    """YAML's plain data. A key that stands twice in a mapping is refused, for one of its values would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if isinstance(key, list | dict | set):
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a key must be a word")
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {key!r} stands twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, error: type[WpjaxError] = WpjaxError) -> Any:
    """The plain data in a YAML file.

    Args:
        path: the file.
        error: what to raise.

    Raises:
        WpjaxError: it cannot be read, or a key stands twice; of the type `error`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.yaml"
    >>> _ = path.write_text("{base: org/model, seed: 3}")
    >>> read_yaml(path)
    {'base': 'org/model', 'seed': 3}
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as failure:
        raise error(f"{path}: cannot be read ({failure.strerror or failure}); name a YAML file") from failure
    except (ValueError, RecursionError, yaml.YAMLError) as failure:
        raise error(f"{path}: not readable as YAML ({' '.join(str(failure).split())[:300]}); correct it") from failure
