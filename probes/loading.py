"""`load`: from a name, a folder, a GGUF file or a module to a `LiveModel`."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from moescope.core.errors import InputError
from moescope.probes.foreign.opening import opened
from moescope.probes.live_model import LiveModel

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAMPLE = 1 << 20
Place = torch.device | str | dict[str, Any]
_EXPECTED = '"demo", a Hub id, a folder, a .gguf file, an nn.Module, a TransformerLens or an nnsight model'


def load(
    model: str | Path | nn.Module | Any,
    *,
    tokenizer: Any = None,
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LiveModel:
    """Load a model to record.

    Args:
        model: "demo" for the bundled MoE; a Hub id; a folder with config, weights and tokenizer; a .gguf file; a
            transformers module already in memory; or a model of another library: TransformerLens (`HookedTransformer`,
            `TransformerBridge`), recorded on the weights it has, or nnsight.
        tokenizer: to use instead of the model's own; for a module, its tokenizer. Without one, only corpora of token ids
            can be recorded.
        device: "auto" (CUDA where there is one; a module stays where it is), or any torch device. All of the model goes
            there.
        device_map: spread the model over several devices instead: "auto" (fill the accelerators, then main memory, then
            disk), or a dict from names of modules to devices; as in transformers' `from_pretrained`, and only for models
            that load reads itself. Taps work on each layer's own device.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16"; a module is converted in place.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run Python code that comes with the model. Off, as it should be for models you do not know.

    Returns:
        The live model, its anatomy found. Weights come from safetensors or GGUF only: nothing is unpickled.

    Raises:
        InputError: no such model, a folder without config or weights, an architecture that cannot be read, a device or
            dtype that does not exist here.

    Example:
        >>> import moescope as ms
        >>> ms.load("demo").anatomy.n_experts is None
        False
    """
    target, kind = _device(device), _dtype(dtype)
    _check_map(model, device, device_map)
    if not isinstance(model, (str, Path)):
        model, tokenizer = opened(model, tokenizer, moved=(device, dtype) != ("auto", "auto"))
        if isinstance(model, LiveModel):
            return model
    if isinstance(model, nn.Module):
        module = model if device == "auto" else model.to(target)
        module = module if isinstance(kind, str) else module.to(kind)
        return LiveModel(module, tokenizer, name=type(model).__name__)
    if not isinstance(model, (str, Path)):
        raise InputError(f"cannot load a {type(model).__name__}", expected=_EXPECTED)
    loaded = _named(
        model,
        device=target if device_map is None else device_map,
        dtype=kind,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if tokenizer is not None:
        loaded.tokenizer = tokenizer
    return loaded


def _named(
    model: str | Path, *, device: Place, dtype: torch.dtype | str, revision: str | None, trust_remote_code: bool
) -> LiveModel:
    """A model by its name, folder or file."""
    if str(model) == "demo":
        from moescope.probes.demo import MODEL_DIR

        return _from_transformers(MODEL_DIR, name="demo", device=device, dtype=dtype, revision=_digest(MODEL_DIR))
    path = Path(model)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InputError(f"there is no file {path}", fix="check the path of the .gguf file")
        return _from_transformers(
            path.parent, name=str(path), device=device, dtype=dtype, revision=_digest(path), gguf_file=path.name
        )
    if path.is_dir():
        _check_folder(path)
        return _from_transformers(
            path,
            name=str(path),
            device=device,
            dtype=dtype,
            revision=_digest(path),
            trust_remote_code=trust_remote_code,
        )
    if path.exists() or not _HUB_ID.fullmatch(str(model)):
        raise InputError(
            f"cannot load {model}",
            expected=_EXPECTED,
            found="a file of another kind" if path.exists() else "no such path",
        )
    return _from_transformers(
        str(model),
        name=str(model),
        device=device,
        dtype=dtype,
        hub_revision=revision,
        trust_remote_code=trust_remote_code,
    )


def _from_transformers(
    source: str | Path,
    *,
    name: str,
    device: Place,
    dtype: torch.dtype | str,
    revision: str | None = None,
    hub_revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> LiveModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    options |= {"revision": hub_revision} if hub_revision else {}
    options |= {"gguf_file": gguf_file} if gguf_file else {}
    spread = {} if isinstance(device, torch.device) else {"device_map": device}
    safe = {} if gguf_file else {"use_safetensors": True}
    progress: Any = logging
    bars = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        loader: Any = AutoModelForCausalLM
        module, info = loader.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **safe, **spread, **options
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as refused:
        raise _explained(name, refused) from refused
    finally:
        if bars:
            progress.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{name} lacks weights, which transformers would fill at random",
            found=f"{len(missing)} missing, for instance {', '.join(missing[:3])}",
            fix="download the model again, or use one whose weights match its configuration",
        )
    # Where there are no tokenizer files, transformers makes a tokenizer that knows only its special tokens.
    knows_text = len(tokenizer) > len(tokenizer.all_special_ids)
    commit = getattr(module.config, "_commit_hash", None)
    module = module.to(device) if isinstance(device, torch.device) else module
    return LiveModel(module, tokenizer if knows_text else None, name=name, revision=revision or commit)


def _explained(name: str, refused: Exception) -> InputError:
    text = " ".join(str(refused).split())
    found = text[:400]
    if isinstance(refused, ValueError) and (
        "does not recognize this architecture" in text
        or "Unrecognized configuration class" in text
        or "Unrecognized model" in text
    ):
        return InputError(
            f"transformers knows no causal language model for {name}",
            found=found,
            fix="upgrade transformers, or pass an nn.Module",
        )
    if isinstance(refused, SafetensorError):
        return InputError(f"the weights of {name} are damaged", found=found, fix="download them again")
    if "trust_remote_code" in text:
        return InputError(
            f"{name} brings its own Python code",
            found=found,
            fix="read that code; if you trust it, pass trust_remote_code=True (--trust-remote-code)",
        )
    if "safetensors" in text:
        return InputError(
            f"{name} has no safetensors weights",
            found=found,
            fix="convert them to safetensors: moescope never unpickles",
        )
    if isinstance(refused, OSError):
        return InputError(
            f"cannot find or read the model {name}",
            found=found,
            fix="check the name, your connection and your access (HF_TOKEN), or pass a local folder",
        )
    return InputError(f"cannot load {name}", found=found)


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path} is not a model folder",
            expected="config.json beside the weights",
            fix="for a GGUF file, pass the file itself" if list(path.glob("*.gguf")) else None,
        )
    if not list(path.glob("*.safetensors")):
        pickled = list(path.glob("*.bin")) or list(path.glob("*.pt"))
        raise InputError(
            f"{path} has no weights",
            expected="*.safetensors",
            found="pickled weights, which moescope never loads" if pickled else "none",
            fix="convert them to safetensors" if pickled else "download the weights into the folder",
        )


def _check_map(model: Any, device: str, device_map: str | dict[str, Any] | None) -> None:
    if device_map is None:
        return
    if device != "auto":
        raise InputError("device and device_map both say where the model goes", fix="pass one of them")
    if not isinstance(model, (str, Path)):
        raise InputError(
            "a model that is in memory already stays where it is",
            found=f"device_map={device_map!r}",
            fix="pass its name or folder, or spread it with accelerate's dispatch_model",
        )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as refused:
        raise InputError(
            f"there is no device {device!r} here", found=" ".join(str(refused).split())[:200], fix="use cpu, or auto"
        ) from refused
    return target


def _dtype(dtype: str) -> torch.dtype | str:
    known: dict[str, torch.dtype | str] = {
        "auto": "auto",
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if dtype not in known:
        raise InputError(f"{dtype!r} is not a dtype that models are loaded in", expected=", ".join(known))
    return known[dtype]


def _digest(path: Path) -> str:
    """SHA-256 over names, sizes and the first and last MiB of a model's files: enough to tell two models apart."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".json", ".safetensors"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_SAMPLE))
            opened.seek(max(size - _SAMPLE, 0))
            digest.update(opened.read(_SAMPLE))
    return "sha256-sampled:" + digest.hexdigest()[:32]
