"""Flags of vLLM, SGLang and TensorRT-LLM, and what to use here instead."""

_ROWS: tuple[tuple[str, str], ...] = (
    (
        "--mem-fraction-static --kv-cache-free-gpu-memory-fraction",
        "use --gpu-memory-utilization, the share for weights, KV cache and temporary arrays "
        "together",
    ),
    (
        "--num-gpu-blocks-override --max-total-tokens",
        "use --kv-cache-memory, the bytes of KV cache on each device",
    ),
    (
        "--max-num-batched-tokens --max-prefill-tokens --max-num-tokens",
        "use --max-chunk, the maximum number of prompt tokens per tick; answers do not count",
    ),
    ("--enable-chunked-prefill", "every prompt is computed in chunks of up to --max-chunk tokens"),
    ("--max-batch-size", "use --max-num-seqs"),
    ("--async-scheduling --no-async-scheduling", "use --results-late"),
    (
        "--enforce-eager --compilation-config -cc -O --disable-cuda-graph --cuda-graph-max-bs",
        "every program is compiled when the server starts, and none after that",
    ),
    ("--load-format", "the layout of a checkpoint is recognized"),
    (
        "--download-dir --revision --tokenizer-revision --code-revision",
        "the server downloads nothing: give the directory of a checkpoint",
    ),
    (
        "--enable-auto-tool-choice --tool-call-parser --tool-parser-plugin",
        "tools need no flag: calls in Llama 3.1's format are parsed",
    ),
    (
        "--structured-outputs-config --guided-decoding-backend --grammar-backend",
        "structured output needs no flag",
    ),
    ("--reasoning-parser", "Llama 3 has no reasoning apart from its answers"),
    ("--max-logprobs", "a request may ask for up to 20 log-probabilities per token"),
    (
        "--enable-prompt-tokens-details --enable-force-include-usage",
        "the usage has the cached tokens, and a stream has the usage if its request asks",
    ),
    ("--trust-remote-code", "the server never runs code from a checkpoint"),
    ("--tokenizer --tokenizer-path --tokenizer-mode", "the server uses the checkpoint's tokenizer"),
    (
        "--chat-template-content-format",
        "whether a chat template reads texts or parts is recognized",
    ),
    (
        "--hf-overrides --json-model-override-args",
        "the model is what the checkpoint's config.json says",
    ),
    (
        "--data-parallel-size -dp --dp-size --api-server-count -asc",
        "one server runs one copy of the model: start several behind a load balancer",
    ),
    (
        "--nnodes -n --node-rank -r --master-addr --master-port --distributed-executor-backend "
        "--dist-init-addr",
        "one server uses the devices of one machine",
    ),
    (
        "--cpu-offload-gb --swap-space",
        "the weights and the KV cache stay on the devices",
    ),
    (
        "--scheduling-policy --schedule-policy",
        "requests run in the order of their field `priority`, and then of their arrival",
    ),
    ("--speculative-config -sc --speculative-algorithm", "there is no speculative decoding"),
    ("--enable-lora --lora-modules --lora-paths --max-loras --max-lora-rank", "there is no LoRA"),
    ("--middleware", "the server runs no code but its own: put a proxy in front of it"),
    ("--ssl-cert-reqs", "--ssl-ca-certs demands client certificates"),
    ("--ssl-ciphers", "the ciphers are those of OpenSSL's default"),
    (
        "--allowed-methods --allowed-headers",
        "--allowed-origins allows the methods and headers that the server reads",
    ),
    ("--enable-request-id-headers", "every answer has the header X-Request-Id"),
    (
        "--enable-log-requests --disable-log-requests --max-log-len --log-requests",
        "use --request-log, without which requests are not logged",
    ),
    (
        "--disable-radix-cache --enable-block-reuse",
        "prefix caching is on; --no-prefix-caching turns it off",
    ),
    (
        "--pp-max-micro-batch-size --pp-async-batch-depth",
        "the pipeline holds one microbatch per stage, which share the places of --max-num-seqs",
    ),
    (
        "--logprobs-mode",
        "log-probabilities are those of the model, before penalties, biases and the temperature",
    ),
    ("--enable-sleep-mode", "end the server, and start it again"),
    ("--stream-interval", "a stream has one event per token"),
    ("--collect-detailed-traces", "every trace has the phases of its request"),
)

ANSWERS = {flag: answer for flags, answer in _ROWS for flag in flags.split()}


def find_foreign_flag(arguments: list[str]) -> tuple[str, str] | None:
    """Returns the first flag of another server on a command line, and the answer to it."""
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag in ANSWERS:
            return flag, ANSWERS[flag]
    return None
