"""The command `advvl sites`: the tensors of a model of transformers that could be perturbed, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from advvl.adapters.candidates import sites
from advvl.errors import AdvVLError, CheckpointError, ConfigurationError
from advvl.models.state_files import read_state


def site_table(arguments: Sequence[str]) -> None:
    """Print the sites of a model by its name or folder, with the shapes and norms that a batch file gives.

    Raises:
        CheckpointError: a model or batch that is not there.
        ConfigurationError: an unknown option; a batch that does not fit the model.
    """
    parser = _Parser(prog="advvl sites", description="List the tensors of a model that could be perturbed.")
    parser.add_argument("model", help="folder of a model of transformers, or its name on the hub")
    parser.add_argument("--batch", metavar="FILE", help="tensors by the model's argument names: .safetensors or .pt")
    parser.add_argument(
        "--class", dest="kind", metavar="NAME", help="class of transformers (default: the one it was saved as)"
    )
    given = parser.parse_args(arguments)
    batch = None if given.batch is None else dict(read_state(given.batch))
    print(sites(_model(given.model, given.kind), batch))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigurationError(f"expected advvl sites MODEL [--batch FILE] [--class NAME], got {message}")


def _model(name: str, kind: str | None) -> nn.Module:
    import transformers

    try:
        saved = None if kind else transformers.AutoConfig.from_pretrained(name).architectures
        kind = kind or (saved[0] if saved else "AutoModel")
        loader = getattr(transformers, kind, None)
        if not hasattr(loader, "from_pretrained"):
            raise ConfigurationError(
                f"expected a class of transformers with from_pretrained, got {kind!r}; as in --class AutoModel"
            )
        model: nn.Module = loader.from_pretrained(name)  # type: ignore[union-attr]
    except AdvVLError:
        raise
    except (OSError, ValueError) as error:
        where = "is no folder here, and " if not Path(name).is_dir() else ""
        raise CheckpointError(
            f"expected a model of transformers, got {name!r}, which {where}transformers cannot load: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return model
