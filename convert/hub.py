"""Downloads checkpoints from the Hugging Face Hub to its cache.

The small files are downloaded first, because they tell which of the large ones are needed: the
index names the shards, and of the two copies of Meta's 405B model one is enough.
"""

import glob
import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from convert.source import SMALL_FILES, TOKENIZER
from llama_jax.checkpoint.directory import INDEX, meta_folder, weight_files
from llama_jax.checkpoint.huggingface_files import SINGLE, read_index
from llama_jax.checkpoint.lora import ADAPTER_WEIGHTS
from llama_jax.config.huggingface import ADAPTER_CONFIG
from sharding.errors import UserError

Progress = Callable[[str, int, int], None]

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Layout → the small files of a repository. Meta's release is in its own folder.
_SMALL_FILES = {
    "hf": [*SMALL_FILES, ADAPTER_CONFIG, INDEX],
    "adapter": [ADAPTER_CONFIG, *TOKENIZER],
    "meta": ["original/*params.json", "original/*tokenizer.model"],
}
_LAYOUT = {
    "hf": "safetensors files: try the command meta, or another repository of the same model",
    "adapter": f"PEFT's layout ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS})",
    "meta": "Meta's layout (a folder named original): try the command hf",
}
_CHOICE = {"hf": "", "adapter": "", "meta": " --include 'original/*'"}


class HubError(UserError):
    """The checkpoint could not be downloaded."""


def local_directory(name: str, layout: str, progress: Progress) -> Path:
    """Returns the directory of a checkpoint, which is downloaded if `name` is that of a model.

    Args:
      name: a directory, or the name of a model on the Hub ("meta-llama/Llama-3.1-8B-Instruct").
      layout: "hf", "meta" or "adapter": which of the layouts in a repository to download.
      progress: called with "Downloading", the bytes downloaded, and their total.

    Raises:
      HubError: it cannot be downloaded.
    """
    if Path(name).exists() or not _NAME.fullmatch(name):
        return Path(name)
    # Imported only when needed, which most conversions do not.
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        download = partial(snapshot_download, name, tqdm_class=_silent_bar(progress))
        directory = Path(download(allow_patterns=_SMALL_FILES[layout]))
        found = _WEIGHTS[layout](directory, download)
    except UserError:
        raise
    except errors.GatedRepoError:
        raise HubError(
            f"You must accept the license of {name} first: do so at "
            f"https://huggingface.co/{name}, log in with `hf auth login` or set HF_TOKEN, and run "
            "the same command again."
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"There is neither a directory {name} nor a model with this name on the Hugging Face "
            "Hub: check the name, or log in with `hf auth login` if the model is private."
        ) from None
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):  # the server did respond
            raise _broken_off(name, error.__cause__) from None
        raise HubError(
            f"There is no directory {name}, and the Hugging Face Hub cannot be reached: run "
            f"`hf download {name}{_CHOICE[layout]} --local-dir DIR` on a machine with network "
            "access, copy DIR here, and give DIR instead."
        ) from None
    except Exception as error:  # HTTP, OS and Xet errors, whose classes depend on the version
        raise _broken_off(name, error) from None
    if not found:
        raise HubError(f"{name} on the Hugging Face Hub has no weights in {_LAYOUT[layout]}.")
    return directory


def _download_weights(directory: Path, download: Callable[..., str]) -> bool:
    """Downloads the weights of a model whose small files are in `directory`, if it has any."""
    if (directory / INDEX).is_file():
        shards = sorted(set(read_index(directory / INDEX).values()))
        download(allow_patterns=[glob.escape(name) for name in shards])
        return True
    if (directory / "config.json").is_file():
        download(allow_patterns=[SINGLE])
        if not (directory / SINGLE).is_file():
            download(allow_patterns=["*.safetensors"], ignore_patterns=["*/*"])
    return bool(weight_files(directory)) or (directory / ADAPTER_CONFIG).is_file()


def _download_meta(directory: Path, download: Callable[..., str]) -> bool:
    """Downloads one release of Meta's, if there is any."""
    folder = meta_folder(directory)
    if folder is None:
        return False
    download(allow_patterns=[f"{folder.relative_to(directory)}/*"])
    return True


def _download_adapter(directory: Path, download: Callable[..., str]) -> bool:
    """Downloads the weights of a LoRA adapter, if there are any."""
    download(allow_patterns=[ADAPTER_WEIGHTS])
    return (directory / ADAPTER_WEIGHTS).is_file()


_WEIGHTS = {"hf": _download_weights, "meta": _download_meta, "adapter": _download_adapter}


def _broken_off(name: str, error: Exception) -> HubError:
    reason = str(error).split("\n", 1)[0].rstrip(".")
    return HubError(
        f"{name} could not be downloaded from the Hugging Face Hub ({reason}): run the same "
        "command again; it continues the download."
    )


def _silent_bar(progress: Progress) -> type:
    """Returns a progress bar class that draws nothing and calls `progress` instead."""
    from tqdm import tqdm

    shown = 0

    class Bar(tqdm):
        monitor_interval = 0  # starts no thread

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, file=io.StringIO())

        def display(self, *args: Any, **kwargs: Any) -> None:
            nonlocal shown
            # The library also has bars that count files and network traffic.
            if self.unit == "B" and self.total and self.n > shown:
                shown = self.n
                progress("Downloading", int(self.n), int(self.total))

        def close(self) -> None:
            """Does nothing, instead of drawing the bar a last time."""

    return Bar
