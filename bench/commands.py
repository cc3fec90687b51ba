"""The subcommands of `python -m bench`: the name of each, its module, and what it does."""

# These have `run(args) -> Result`.
MEASUREMENTS = {
    "step": ("bench.step", "one rank's decode and prefill tick at full size"),
    "model": ("bench.model", "a whole model on one device"),
    "attention": ("bench.attention", "the attention that this device uses: is it right, how fast"),
    "kernels": ("bench.kernels", "where the time of a tick goes on a GPU, kernel by kernel"),
    "products": ("bench.products", "a layer's matrix products, by weight format and rows"),
    "serve": ("bench.serve_load", "an OpenAI-compatible server under open-loop load"),
    "engine": ("bench.engine", "host time per tick, the scheduler, and streaming over HTTP"),
    "peers": ("bench.peers", "decoding and prefill, beside transformers and a JAX peer"),
    "sampling": ("bench.sampling", "choosing tokens, by what the rows of a packet ask for"),
    "gpu-peer": ("bench.gpu_peer", "decoding on one GPU, beside transformers"),
    "scaling": ("bench.scaling", "cost by batch, context, prompt length, sequences and pages"),
    "contexts": ("bench.contexts", "a decode tick with one long context among short ones"),
    "startup": ("bench.start_up", "from starting the server to its first answer"),
    "loading": ("bench.loading", "the memory that loading takes"),
    "load-speed": ("bench.load_speed", "the speed of loading, against transformers"),
    "convert": ("bench.conversion", "speed and memory of conversion, against cp"),
    "quantization": ("bench.quantization", "error and answers of each quantized format"),
    "kv-cache-dtype": ("bench.kv_cache_dtype", "error, memory and time of each KV cache dtype"),
    "divergence": ("bench.divergence", "how soon answers diverge beside other requests"),
    "closed-loop": ("bench.closed_loop", "the same load simulated by the planner, and served"),
    "simulation": ("bench.simulation", "the CPU time of simulating an hour"),
    "buckets": ("bench.buckets", "the scheduler by the buckets of its programs, simulated"),
    "targets": ("bench.latency_targets", "what latency targets do to 70B on 8 x H100, simulated"),
    "structured": ("bench.structured_output", "what requests with a grammar cost the others"),
    "hostile": ("bench.hostile_requests", "how long hostile requests stop the event loop"),
    "roofline": ("bench.roofline", "copy bandwidth and matrix rate of this device"),
    "published": ("bench.published", "the planner's arithmetic against published measurements"),
    "audit": ("bench.audit", "the compiled programs for 8 x H100, without a GPU"),
}
# These read results and have `run(args) -> None`.
READERS = {
    "compare": ("bench.compare", "show two results side by side"),
    "calibrate": ("bench.calibrate", "write what a capacity planner needs from results"),
    "report": ("bench.report", "render the committed results as one Markdown page with plots"),
}
