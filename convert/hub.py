"""Downloads checkpoints from the Hugging Face Hub to its cache."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharding.errors import UserError

Progress = Callable[[str, int, int], None]

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Layout → the files of a repository that are downloaded. Meta's release is in its own folder; other
# formats of the same weights are not downloaded.
_NEEDED = {
    "hf": [
        "config.json",
        "generation_config.json",
        "hf_quant_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "LICENSE*",
        "NOTICE*",
        "USE_POLICY*",
    ],
    "meta": ["original/*"],
}
_LAYOUT = {
    "hf": "Hugging Face layout: try the command meta",
    "meta": "Meta's layout (a folder named original): try the command hf",
}
_CHOICE = {"hf": "", "meta": " --include 'original/*'"}


class HubError(UserError):
    """The checkpoint could not be downloaded."""


def local_directory(name: str, layout: str, progress: Progress) -> Path:
    """Returns the directory of a checkpoint, which is downloaded if `name` is that of a model.

    Args:
      name: a directory, or the name of a model on the Hub ("meta-llama/Llama-3.1-8B-Instruct").
      layout: "hf" or "meta": which of the layouts in a repository to download.
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
        directory = snapshot_download(
            name, allow_patterns=_NEEDED[layout], tqdm_class=_silent_bar(progress)
        )
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
    if not Path(directory).is_dir():
        raise HubError(f"{name} on the Hugging Face Hub has no weights in {_LAYOUT[layout]}.")
    return Path(directory)


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
