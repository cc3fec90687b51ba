"""The sample text for comparing a quantized model with its source. Imports no JAX."""

import tempfile
from pathlib import Path

from convert.source import Source
from llama_jax.checkpoint import CheckpointError
from llama_jax.text.tokenizer import Tokenizer, TokenizerError

WINDOW = 512  # tokens per sequence
MAX_TOKENS = 4096

TEXT = """\
A ferry crosses the bay four times a day. In winter the first one leaves in the dark, and whoever \
stands at the rail sees the lights of the harbour draw together into one, until the swell hides it.

Ana: Did you bring the map?
Ben: I thought you had it. We could ask at the lighthouse; somebody must be there at this hour.
Ana: "Somebody" was there in 1987. Now it runs by itself, and the door has been locked for years.

To bake the bread, mix 500 g of flour with 350 ml of lukewarm water, 10 g of salt and a little \
yeast. Let the dough rest for twelve hours. Fold it, wait until it has risen again, and bake it at \
240 °C for forty minutes. It is done when it sounds hollow.

Why is the sky blue? Air scatters light of short wavelengths more strongly than light of long \
ones, with the fourth power of the frequency. At noon we see the scattered part from every \
direction; at sunset the rest comes straight to us, after a long way through the air, and it is red.

def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2

If a train goes 84 km in 35 minutes, its speed is 84 / 35 = 2.4 km a minute, which is 144 km/h. A \
second train that starts 10 minutes later at 180 km/h is 24 km behind, gains 36 km every hour, and \
so draws level after 40 minutes, 120 km from the station.

Der Zug nach Basel fährt heute von Gleis sieben. Le musée est fermé le mardi. El mercado abre a \
las ocho, y los sábados hay música en la plaza.

The committee met twice in March. It found no fault with the accounts, thanked the treasurer, and \
asked that next year's report be shorter; a proposal to replace the old printer was put off until \
somebody could say what was wrong with it.
"""


def sample_windows(source: Source, file: Path | None) -> list[list[int]]:
    """Tokenizes a text into windows that each begin with BOS.

    Args:
      source: the checkpoint whose tokenizer is used.
      file: the text, in UTF-8; None for `TEXT`.

    Returns:
      Windows of equal length except the last, of at most `MAX_TOKENS` in all.

    Raises:
      CheckpointError: the text cannot be read, or the tokenizer is missing or not the model's.
    """
    text = TEXT if file is None else _read(file)
    path, config = source.reader.path, source.reader.config
    with tempfile.TemporaryDirectory() as folder:
        source.write_companions(Path(folder), config)
        try:
            tokenizer = Tokenizer(folder)
        except TokenizerError:
            raise CheckpointError(
                f"{path} has no valid tokenizer, which --check needs: copy the model's "
                "tokenizer.json and tokenizer_config.json there."
            ) from None
        ids = tokenizer.encode(text, add_bos=False)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    largest = max([*bos, *ids])
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"The tokenizer of {path} produces token {largest}, which is outside the model's "
            f"vocabulary of {config.vocab_size}: copy the model's own tokenizer there."
        )
    width = min(WINDOW, config.max_position_embeddings)
    step = width - len(bos)
    windows = [bos + ids[start : start + step] for start in range(0, len(ids), step)]
    return windows[: MAX_TOKENS // width]


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{file} is not UTF-8 text: give another file to --check.") from None
    if not text.strip():
        raise CheckpointError(f"{file} is empty: give another file to --check.")
    return text
