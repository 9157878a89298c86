"""The command `advvl sites`: the tensors of a model of transformers that could be perturbed, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from torch import nn

from advvl.adapters.candidates import sites
from advvl.errors import AdvVLError, CheckpointError, ConfigurationError
from advvl.experiments.command_line import Parser
from advvl.models.state_files import read_state


def site_table(arguments: Sequence[str]) -> None:
    """Print the sites of a model by its name or folder, with the shapes and norms that a batch file gives.

    Raises:
        CheckpointError: a model or batch that is not there; a hub that does not answer, for a model not in the cache.
        ConfigurationError: an unknown option; a batch that does not fit the model.
    """
    parser = Parser(
        prog="advvl sites", description="List the tensors of a model that could be perturbed.", allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a model of transformers, or its name on the hub")
    parser.add_argument("--batch", metavar="FILE", help="tensors by the model's argument names: .safetensors or .pt")
    parser.add_argument(
        "--class", dest="kind", metavar="NAME", help="class of transformers (default: the one it was saved as)"
    )
    given = parser.parse_args(arguments)
    batch = None if given.batch is None else dict(read_state(given.batch))
    print(sites(_model(given.model, given.kind), batch))


_PATIENCE: Final = 10.0  # seconds


def _model(name: str, kind: str | None) -> nn.Module:
    import transformers

    folder = Path(name).is_dir()
    local = folder or not _hub_answers(name)
    try:
        saved = None if kind else transformers.AutoConfig.from_pretrained(name, local_files_only=local).architectures
        kind = kind or (saved[0] if saved else "AutoModel")
        loader = getattr(transformers, kind, None)
        if not hasattr(loader, "from_pretrained"):
            raise ConfigurationError(
                f"expected a class of transformers with from_pretrained, got {kind!r}; as in --class AutoModel"
            )
        model: nn.Module = loader.from_pretrained(name, local_files_only=local)  # type: ignore[union-attr]
    except AdvVLError:
        raise
    except (OSError, ValueError) as error:
        where = "" if folder else "is no folder here, and "
        raise CheckpointError(
            f"expected a model of transformers, got {name!r}, which {where}transformers cannot load: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return model


def _hub_answers(name: str) -> bool:
    """True if the hub can be asked for a model, known to it or not; transformers would try for half a minute."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        model_info(name, timeout=_PATIENCE)
    except (HfHubHTTPError, HFValidationError):  # it answers, or will not be asked
        return True
    except Exception:  # no connection, in the words of whichever client the hub's library has
        return False
    return True
