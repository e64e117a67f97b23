"""Which model is asked for, where it is to run and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .files import ADAPTER, ModelFiles

DEFAULT_MODEL = Path(__file__).parents[1] / "default_model"
DEFAULT_NAME = "globenc-sst2-small"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSource:
    """Which model is loaded, and how: for `globenc.extract`, `globenc.evaluate` and `GlobEnc.from_pretrained`.

    Attributes:
        name: folder or hub name; None is the small sentiment classifier that ships with globenc.
        device: where it runs; None is the GPU where there is one, else the CPU.
        dtype: of the weights, such as "float32"; None is the stored one on a GPU, and float32 on a CPU where half
            precision is stored.
        backend: "auto", "torch", "triton" or "reference", as in `globenc.attribute`.
        revision: branch, tag or commit on the hub.
        trust_remote_code: allow code that comes with the model to run.

    >>> import globenc
    >>> globenc.GlobEnc.from_pretrained(globenc.ModelSource(dtype="float64")).model.dtype
    torch.float64
    """

    name: str | Path | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype | str | None = None
    backend: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False


def resolve_name(name_or_path: str | Path | None) -> str:
    """A hub name, or a folder that holds a model."""
    if name_or_path is None:
        return str(DEFAULT_MODEL)
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"name_or_path must be a folder or a hub name, got {type(name_or_path).__name__}")
    folder, name = Path(name_or_path).expanduser(), str(name_or_path)
    if name and folder.is_file():
        raise OSError(f"{name!r} is a file: give the folder that holds the model, with its config.json")
    if name and folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise ModelFiles(name).refuse(ADAPTER)
        if not (folder / "config.json").is_file():
            inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
            hint = f"; there is one in {str(folder / inside[0])!r}" if len(inside) == 1 else ""
            raise OSError(f"no model in folder {name!r}: it has no config.json{hint}")
        return str(folder)
    if isinstance(name_or_path, Path) or not name or name.startswith(("/", ".", "~", "\\")) or name.count("/") > 1:
        raise OSError(f"there is no folder {name!r} to load a model from")
    return name


def choose_device(asked: str | torch.device | None) -> torch.device:
    """Where to run; the best there is where nothing was asked for."""
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ValueError(f'device must be "cpu", "cuda", "cuda:1" or the like, got {asked!r}') from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RuntimeError(f"there is no device {str(device)!r} here: torch sees {count} CUDA GPUs")
    return device


def check_dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if asked is not None and found not in FLOATS.values():
        raise ValueError(f"dtype must be float64, float32, bfloat16 or float16, got {asked!r}")
    return found
