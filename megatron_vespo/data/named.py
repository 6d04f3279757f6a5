"""What a person names in the configuration: "package.module:name" or "path/to/file.py:name"."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_vespo.config import ConfigError


def load_named(target: str, setting: str) -> Any:
    """Import what `target` names.  A file may import its neighbours; a module must be installed, or on PYTHONPATH.

    Args:
        setting: where the person wrote it, for error messages.

    Raises:
        ConfigError: no such file, module or name, or it cannot be imported.
    """
    where, colon, name = target.rpartition(":")
    if not (where and colon and name.isidentifier()):
        raise ConfigError(
            f"{setting} = '{target}': expected 'package.module:name' or 'path/to/file.py:name'; write it so"
        )
    try:
        module = _file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as err:
        raise ConfigError(
            f"{setting} = '{target}': expected to import '{where}', but {type(err).__name__}: {err}; mend it, give a file's "
            "path, or set PYTHONPATH"
        ) from err
    if hasattr(module, name):
        return getattr(module, name)
    public = [known for known in vars(module) if not known.startswith("_")]
    near = difflib.get_close_matches(name, public, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(public) or 'nothing'}."
    raise ConfigError(f"{setting} = '{target}': '{where}' has no '{name}'; {hint}")


def _file(path: Path) -> ModuleType:
    path = path.resolve()
    # A name of our own: `math.py` must not replace the standard library's.
    spec = importlib.util.spec_from_file_location(f"named_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module
