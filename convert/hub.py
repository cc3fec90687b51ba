"""Checkpoints by their names on the Hugging Face Hub: fetched into its cache, as others do it."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharding.errors import UserError

Progress = Callable[[str, int, int], None]

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# By layout, what of a repository is needed. What Meta released lies in a folder of its own; weights
# in other formats, which may be as large again, are left where they are.
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
    "meta": "the form of Meta's release (a folder original): try the command hf",
}
_CHOICE = {"hf": "", "meta": " --include 'original/*'"}


class HubError(UserError):
    """A checkpoint that could not be fetched; the message is one sentence for the user."""


def local_directory(name: str, layout: str, progress: Progress) -> Path:
    """The directory of a checkpoint; fetched first, if there is none and a model may be meant.

    Args:
      name: a directory, or the name of a model on the Hub ("meta-llama/Llama-3.1-8B-Instruct").
      layout: "hf" or "meta": which of the two that a repository may hold.
      progress: called with "Fetching", the bytes that have come, and their total.

    Raises:
      HubError: it cannot be fetched.
    """
    if Path(name).exists() or not _NAME.fullmatch(name):
        return Path(name)
    # Imported when needed: most conversions do without it.
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        directory = snapshot_download(
            name, allow_patterns=_NEEDED[layout], tqdm_class=_silent_bar(progress)
        )
    except errors.GatedRepoError:
        raise HubError(
            f"{name} is open only to those who have accepted its licence: do so at "
            f"https://huggingface.co/{name}, then log in with `hf auth login` or set HF_TOKEN, and "
            "run the same command again."
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"There is neither a directory {name} nor a model of this name on the Hugging Face Hub "
            "that you may see: check the name, or log in with `hf auth login` if it is private."
        ) from None
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):  # there was an answer
            raise _broken_off(name, error.__cause__) from None
        raise HubError(
            f"There is no directory {name}, and the Hugging Face Hub cannot be reached to fetch a "
            "model of this name: on a machine with a network run "
            f"`hf download {name}{_CHOICE[layout]} --local-dir DIR`, copy DIR here, and give it "
            "instead."
        ) from None
    except Exception as error:  # of whatever transport this version of the library has
        raise _broken_off(name, error) from None
    if not Path(directory).is_dir():
        raise HubError(f"{name} on the Hugging Face Hub has no weights in {_LAYOUT[layout]}.")
    return Path(directory)


def _broken_off(name: str, error: Exception) -> HubError:
    reason = str(error).split("\n", 1)[0].rstrip(".")
    return HubError(
        f"{name} could not be fetched from the Hugging Face Hub ({reason}): run the same command "
        "again, what has arrived is kept."
    )


def _silent_bar(progress: Progress) -> type:
    """A progress bar for the library to move, which draws nothing and tells what has come."""
    from tqdm import tqdm

    most = 0

    class Bar(tqdm):
        monitor_interval = 0  # no thread that moves it

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, file=io.StringIO())

        def display(self, *args: Any, **kwargs: Any) -> None:
            nonlocal most
            # Beside the one that counts bytes on disk there are others, for files and the network.
            if self.unit == "B" and self.total and self.n > most:
                most = self.n
                progress("Fetching", int(self.n), int(self.total))

        def close(self) -> None:
            """Nothing is left to be said when the library, or the collector, is done with it."""

    return Bar
