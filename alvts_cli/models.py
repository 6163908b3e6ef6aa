"""Names of models, and loading one by name, hub id or folder.

torch and transformers are imported where they are used, so that listing the names stays quick.
"""

import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AlvtsError

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")

# Below this many weights half precision saves nothing worth having.
_SMALL = 200_000_000


@dataclass(frozen=True)
class Known:
    """A model with a short name."""

    hub_id: str
    family: str


OURS = ("pocket", "smol")
"""Those that come with alvts and not from a hub."""

KNOWN = {
    "pocket": Known("(ships with alvts)", "LLaVA"),
    "smol": Known("(alvts smol fetch)", "LLaVA"),
    "llava-1.5-7b": Known("llava-hf/llava-1.5-7b-hf", "LLaVA"),
    "llava-1.5-13b": Known("llava-hf/llava-1.5-13b-hf", "LLaVA"),
    "llava-next-7b": Known("llava-hf/llava-v1.6-vicuna-7b-hf", "LLaVA-NeXT"),
    "llava-next-13b": Known("llava-hf/llava-v1.6-vicuna-13b-hf", "LLaVA-NeXT"),
    "llava-next-mistral-7b": Known("llava-hf/llava-v1.6-mistral-7b-hf", "LLaVA-NeXT"),
    "qwen2.5-vl-3b": Known("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL"),
    "qwen2.5-vl-7b": Known("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL"),
    "qwen3-vl-2b": Known("Qwen/Qwen3-VL-2B-Instruct", "Qwen3-VL"),
    "qwen3-vl-4b": Known("Qwen/Qwen3-VL-4B-Instruct", "Qwen3-VL"),
    "qwen3-vl-8b": Known("Qwen/Qwen3-VL-8B-Instruct", "Qwen3-VL"),
    "qwen3-vl-30b-a3b": Known("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen3-VL"),
    "qwen2-vl-2b": Known("Qwen/Qwen2-VL-2B-Instruct", "Qwen2-VL"),
    "qwen2-vl-7b": Known("Qwen/Qwen2-VL-7B-Instruct", "Qwen2-VL"),
    "llava-onevision-7b": Known("llava-hf/llava-onevision-qwen2-7b-ov-hf", "LLaVA-OneVision"),
    "internvl3-2b": Known("OpenGVLab/InternVL3-2B-hf", "InternVL"),
    "internvl3-8b": Known("OpenGVLab/InternVL3-8B-hf", "InternVL"),
    "internvl3.5-8b": Known("OpenGVLab/InternVL3_5-8B-HF", "InternVL"),
    "smolvlm-256m": Known("HuggingFaceTB/SmolVLM-256M-Instruct", "Idefics3"),
    "smolvlm-500m": Known("HuggingFaceTB/SmolVLM-500M-Instruct", "Idefics3"),
    "smolvlm2-2.2b": Known("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "SmolVLM"),
    "glm-4.1v-9b": Known("zai-org/GLM-4.1V-9B-Thinking", "GLM-V"),
    "mistral-small-3.1-24b": Known("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "Mistral 3"),
}


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    Attributes:
        name: as it was asked for.
        model_id: hub id, or the folder's path.
        revision: commit of the hub; None for a folder.
        model: in eval mode, on its device.
        processor: of the model.
    """

    name: str
    model_id: str
    revision: str | None
    model: Any
    processor: Any

    @property
    def device(self) -> "torch.device":
        """Where the inputs go."""
        return self.model.device

    @property
    def dtype(self) -> "torch.dtype":
        """What the weights are in."""
        return self.model.dtype


def load_model(
    name: str,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a model and its processor.

    Args:
        name: one of `KNOWN`, a hub id, or a folder in `save_pretrained` layout.
        device: "auto" (CUDA if there is one, else the CPU), or what torch knows it by.
        dtype: one of `DTYPES`. None: float32 for a small model; else the checkpoint's own on a
            GPU, and on a CPU bfloat16 where the CPU computes in it, float32 where not. Of a
            quantised model always the checkpoint's own.
        trust_remote_code: run code that the model brings with it; without, none is ever run.

    Raises:
        AlvtsError: no such model, one of `OURS` with code to run, an unknown architecture,
            quantised weights that cannot be read, no network and nothing cached, a broken folder,
            an unknown device or dtype, or not enough memory.
    """
    if trust_remote_code and name in OURS:
        raise AlvtsError(
            f"{name} brings no code with it; --trust-remote-code would do nothing: leave it out"
        )
    place = parse_device(device)
    asked = None if dtype is None else parse_dtype(dtype)
    model_id = resolve_name(name)
    local = Path(model_id).is_dir()
    cached = not local and cached_folder(model_id) is not None
    if not local and not cached:
        _ask_hub(model_id)

    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from .families import family_of
    from .families.quantised import check_quantised, quantised_by
    from .memory import count_parameters, memory_need, prefill_need, require_memory

    if trust := trust_remote_code:
        warnings.warn(f"code that {name} brings with it will be run", stacklevel=2)
    # Left out, transformers would ask on standard output whether to run that code.
    more: dict[str, Any] = {"trust_remote_code": trust}
    if local or cached:
        more["local_files_only"] = True
    bars = logging.is_progress_bar_enabled()
    if local or cached:
        logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(model_id, **more)
        family_of(config)
        check_quantised(config)
        precision = asked or _default_dtype(config, place, count_parameters(config, trust))
        need = memory_need(config, precision, trust_remote_code=trust)
        method = quantised_by(config)
        if method == "compressed-tensors":
            config.quantization_config["dequantize"] = True
        elif method is not None:
            # Of one that is still to be fetched, there is no telling what its weights take.
            folder = Path(model_id) if local else cached_folder(model_id)
            need = prefill_need(config, precision, 1024, 1) + _stored(folder)
        require_memory(name, need, place)
        revision = getattr(config, "_commit_hash", None)
        if revision is not None:
            # The weights of the very commit whose config was checked.
            more["revision"] = revision
        auto: Any = AutoModelForImageTextToText
        model, report = auto.from_pretrained(
            model_id, config=config, dtype=precision, output_loading_info=True, **more
        )
        processor = AutoProcessor.from_pretrained(model_id, **more)
    except AlvtsError:
        raise
    except Exception as error:
        if not trust and "trust_remote_code" in str(error):
            raise AlvtsError(
                f"{model_id} needs code that it brings with it, which alvts does not run; read it, "
                "and if you trust it, give --trust-remote-code"
            ) from None
        # The libraries raise half a dozen types here, for files that all have one thing in common.
        raise AlvtsError(f"cannot load {model_id}: {first_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        raise AlvtsError(
            f"the weights in {model_id} lack {len(missing)} tensors, such as {missing[0]}; "
            "download the model again"
        )
    return Loaded(name, model_id, revision, model.to(place).eval(), processor)


def resolve_name(name: str) -> str:
    """The hub id or folder that `name` stands for.

    Raises:
        AlvtsError: it stands for nothing.
    """
    if not name.strip():
        # As a path it would be the folder here.
        raise AlvtsError("the model's name is empty; give a name, a hub id or a folder")
    if name == "pocket":
        from .pocket import WEIGHTS

        if not (WEIGHTS / "config.json").is_file():
            raise AlvtsError("the weights of pocket are not in this installation; reinstall alvts")
        return str(WEIGHTS)
    if name == "smol":
        from .smol.fetch import smol_folder

        if not smol_folder().is_dir():
            raise AlvtsError("smol is not on this machine yet; run: alvts smol fetch")
        return str(smol_folder())
    if name in KNOWN:
        return KNOWN[name].hub_id
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise AlvtsError(f"{name} is not a model folder: there is no config.json in it")
        return name
    if folder.exists():
        raise AlvtsError(f"{name} is a file; give the folder of a model, or a name or hub id")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is None:
        raise AlvtsError(
            f"no model {name!r}: not a folder, not a hub id, and not one of {', '.join(KNOWN)}"
        )
    return name


def find_selectors(loaded: Loaded, named: str | None = None) -> Path:
    """The file of selectors that is named (see `hub.selectors_file`), or else what is found.

    Found is `<name>.alvts.safetensors` here, as `alvts calibrate` writes it, or
    `selectors.safetensors` in the model's folder or in its repo on the hub.

    Raises:
        AlvtsError: what is named cannot be had, or nothing is found.
    """
    from .hub import FILE, offered, selectors_file
    from .smol import SELECTORS

    if named is not None:
        return selectors_file(named)
    short = Path(loaded.name).name
    places = [
        Path(f"{short}.alvts.safetensors"),
        # Those of this release; the folder may be of an earlier one.
        *([SELECTORS] if loaded.name == "smol" else ()),
        Path(loaded.model_id) / FILE,
    ]
    for place in places:
        if place.is_file():
            return place
    if not Path(loaded.model_id).is_dir():
        found = offered(loaded.model_id, loaded.revision)
        if found is not None:
            return found
    raise AlvtsError(
        f"no selectors for {loaded.name}; fit some with: alvts calibrate --model {loaded.name} "
        f"--out {places[0]}, or pass --dense"
    )


def cached_folder(hub_id: str) -> Path | None:
    """The folder of the hub's cache that holds all of the weights, or None."""
    from huggingface_hub import try_to_load_from_cache

    def cached(file: str) -> Path | None:
        path = try_to_load_from_cache(hub_id, file)
        return Path(path) if isinstance(path, str) else None

    if cached("config.json") is None:
        return None
    index = cached("model.safetensors.index.json")
    if index is not None:
        shards = set(json.loads(index.read_text())["weight_map"].values())
        return index.parent if all((index.parent / shard).exists() for shard in shards) else None
    single = cached("model.safetensors")
    return None if single is None else single.parent


def parse_device(device: str) -> "torch.device":
    """A device that is there; "auto" picks.

    Raises:
        AlvtsError: not a device, or not one of this machine.
    """
    import torch

    if device == "auto":
        # Of several processes on a machine, each its own.
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return torch.device(own if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    # A backend that is not installed fails in a way of its own.
    except Exception as error:
        raise AlvtsError(f"device {device!r} cannot be used: {first_line(error)}") from None
    if place.type == "meta":
        raise AlvtsError("device 'meta' cannot be used: nothing is computed there")
    return place


def parse_dtype(dtype: str) -> "torch.dtype":
    """A dtype by its name.

    Raises:
        AlvtsError: not one of `DTYPES`.
    """
    import torch

    if dtype not in DTYPES:
        raise AlvtsError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return getattr(torch, dtype)


def usual_dtype(device: "torch.device") -> "torch.dtype":
    """bfloat16; float32 on a CPU that has no instructions for it and would be many times slower."""
    import torch

    slow = device.type == "cpu" and not cpu_computes_bfloat16()
    return torch.float32 if slow else torch.bfloat16


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions; False where there is no telling."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) is not None


def first_line(error: BaseException) -> str:
    """What an exception says, on one line and of readable length."""
    text = str(error).strip()
    line = text.splitlines()[0].strip() if text else type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."


def _default_dtype(config: Any, device: "torch.device", parameters: int) -> "torch.dtype":
    import torch

    from .families.quantised import quantised_by

    if quantised_by(config) is not None:
        # Which its kernels may not do without.
        return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    if parameters < _SMALL:
        return torch.float32
    if device.type == "cpu":
        return usual_dtype(device)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16


def _stored(folder: Path | None) -> int:
    """Bytes of the weights in a model's folder; 0 without one."""
    files = [] if folder is None else folder.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _ask_hub(hub_id: str) -> None:
    """Fail early and in one line where the hub will not give the model.

    Loading would try each file several times, with a warning for every try.

    Raises:
        AlvtsError: no such model, no access, or no hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().model_info(hub_id, timeout=10)
    except RepositoryNotFoundError:
        raise AlvtsError(
            f"the hub has no model {hub_id}, or it asks for a login: hf auth login"
        ) from None
    except HfHubHTTPError as error:
        raise AlvtsError(f"the hub refuses {hub_id}: {first_line(error)}") from None
    except Exception as error:
        # Whatever the HTTP library in use raises: there is no connection.
        raise AlvtsError(
            f"{hub_id} is not on this machine and the hub cannot be reached; download it where "
            f"there is a network (hf download {hub_id}) and pass its folder as --model, or set "
            "HF_HOME to a cache that has it"
        ) from error
