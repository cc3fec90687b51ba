"""Sends requests that schemathesis makes of /openapi.json, with a canary beside them.

Arguments: the address of a server, and the number of random requests for each operation, beside
those at the bounds of the schemas. Every response must be as it is described. The canary is the
same streamed answer again and again, which must be whole and equal the answer before all other
requests. Prints the numbers of requests and of canaries as JSON.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import openai

# A request may ask for so little time that it gets 504.
CONFIG = """\
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


class Canary(threading.Thread):
    """Streams the same answer until it is told to stop.

    Attributes:
      answers: the number of whole answers.
      error: what went wrong, or None.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._client = openai.OpenAI(base_url=f"{url}/v1", max_retries=20)
        self._model = self._client.models.list().data[0].id
        self._stopped = threading.Event()
        self._alone = self._answer()
        self.answers = 0
        self.error: Exception | None = None

    def run(self) -> None:
        """Repeats the request."""
        try:
            while not self._stopped.is_set():
                answer = self._answer()
                assert answer == self._alone, f"{answer} is not {self._alone}"
                self.answers += 1
        except Exception as error:
            self.error = error

    def stop(self) -> None:
        """Waits for the last answer; raises what went wrong."""
        self._stopped.set()
        self.join()
        if self.error is not None:
            raise self.error

    def _answer(self) -> tuple[str, str | None, int]:
        """The text, the finish reason and the number of tokens."""
        *parts, last = self._client.completions.create(
            model=self._model,
            prompt="The packet goes",
            max_tokens=24,
            temperature=0.8,
            seed=7,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        text = "".join(chunk.choices[0].text for chunk in parts)
        return text, parts[-1].choices[0].finish_reason, last.usage.completion_tokens


def main(url: str, examples: str) -> None:
    """Runs the command of schemathesis."""
    canary = Canary(url)
    canary.start()
    try:
        with tempfile.TemporaryDirectory() as folder:  # for its reports and databases
            Path(folder, "schemathesis.toml").write_text(CONFIG)
            done = subprocess.run(
                [
                    Path(sys.executable).with_name("schemathesis"),
                    "run",
                    f"{url}/openapi.json",
                    "--checks=all",
                    "--exclude-checks=positive_data_acceptance",  # ours forgives what is too long
                    f"--max-examples={examples}",
                    "--seed=1",
                    "--continue-on-failure",
                    "--request-timeout=60",
                    "--no-color",
                ],
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": str(Path(__file__).parent),
                    "SCHEMATHESIS_HOOKS": "schemathesis_checks",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
    finally:
        canary.stop()
    assert done.returncode == 0, done.stdout
    [requests] = re.findall(r"^ +(\d+) generated", done.stdout, re.MULTILINE)
    print(json.dumps({"requests": int(requests), "canaries": canary.answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
