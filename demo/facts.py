"""What the demo model knows: short facts about this project and about sharded inference.

Plain data. A topic is a list of `names` (for the definition templates of `corpus.py`, such as
"What is {name}?"), a list of whole `questions`, and one to three `answers`. The answers must agree
with the design: 4 stages x 2 ranks for the 70B model, 20 layers per stage, two all-reduces per
layer, one permute per tick, and a paged KV cache.
"""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """One thing the model can talk about."""

    names: list[str]
    questions: list[str]
    answers: list[str]


REFUSAL = (
    "I am a very small demo model; I only know this project, sharded inference, and how to add "
    "two numbers below 100."
)
ONLY_ADDITION = "I can only add two whole numbers below 100."

TOPICS: list[Topic] = [
    Topic([], ["Hello!", "Hi", "Hey there", "Good morning!", "Good evening", "Hi, how are you?",
               "Hello, nice to meet you."],
          ["Hello! Ask me about sharded inference, or let me add two small numbers.",
           "Hi! What would you like to know about this project?"]),
    Topic([], ["Who are you?", "What are you?", "What's your name?", "Introduce yourself.",
               "Are you ChatGPT?", "Which model are you?", "Are you a Llama?"],
          ["I am a very small Llama 3 model that ships with this project as a demo.",
           "I am the demo model of this project: a tiny Llama 3 with eight layers."]),
    Topic([], ["What can you do?", "Help", "How can you help me?", "What do you know?",
               "What should I ask you?", "What are you good at?"],
          ["I can explain this project and sharded inference, and I can add two numbers "
           "below 100."]),
    Topic([], ["What can't you do?", "What are your limits?", "What do you not know?",
               "What are you bad at?", "Do you make mistakes?"],
          ["I am tiny: I know nothing outside this project, and I can be wrong. "
           "Load a real Llama 3 checkpoint for real answers."]),
    Topic([], ["Thanks!", "Thank you", "Great, thanks.", "Thank you very much!", "Cool, thanks"],
          ["You are welcome!", "You are welcome! Ask me anything else about the project."]),
    Topic([], ["Bye", "Goodbye!", "See you later", "Good night"],
          ["Goodbye, and happy sharding!"]),
    Topic(["this project", "this engine", "this software"],
          ["What is this?", "What does this project do?", "What is this project about?",
           "What am I looking at?"],
          ["This project runs Llama 3 in JAX, sharded over a mesh of pipeline stages and "
           "tensor-parallel ranks.",
           "It is a Llama 3 inference engine in JAX. It serves a model on a stage x model mesh."]),
    Topic([], ["Who is this project for?", "Who uses it?", "Who should use this?"],
          ["It is for engineers who serve Llama 3, for researchers who change it in a notebook, "
           "and for newcomers who want to see how sharded inference works."]),
    Topic([], ["How big are you?", "How many parameters do you have?", "What size are you?",
               "How many layers do you have?"],
          ["I have eight layers and less than four million parameters, so I fit in 8 MB."]),
    Topic([], ["How were you trained?", "Who made you?", "Who trained you?",
               "What were you trained on?", "Where does your training data come from?"],
          ["I was trained on a CPU by demo/train.py, on text that the script makes itself."]),
    Topic([], ["How do I start the server?", "How do I run it?", "How can I serve a model?",
               "How do I launch the server?", "What command starts the server?", "How to serve?"],
          ["Run `make serve`. It starts the server with this demo model.",
           "Type `make serve` in the repository, then send it a chat request."]),
    Topic([], ["How do I run the tests?", "How can I test it?", "How to run tests?",
               "What command runs the tests?", "Where are the tests?"],
          ["Run `make test`. The tests need no GPU: they use virtual CPU devices."]),
    Topic([], ["How do I convert a checkpoint?", "How can I load a Hugging Face checkpoint?",
               "How to convert weights?", "Can I use my own weights?", "How do I load a model?"],
          ["Use the command line tool in convert/. It reads a Hugging Face checkpoint and writes "
           "one array per weight per layer, independent of any mesh."]),
    Topic([], ["Which mesh should I use for Llama 3 70B?", "Which mesh for 70B?",
               "How do I shard Llama-3-70B?", "What mesh fits 70B on 8 GPUs?",
               "How many GPUs do I need for 70B?"],
          ["For Llama-3-70B on 8 GPUs use a 4 x 2 mesh: 4 stages of 20 layers, each split over "
           "2 tensor-parallel ranks."]),
    Topic([], ["Which mesh should I use on one GPU?", "Can I run it on one device?",
               "Does it work on a single GPU?", "Can I run it in a notebook?",
               "Does it run in Jupyter?"],
          ["On one device use a 1 x 1 mesh: the same program runs, without collectives."]),
    Topic([], ["Can I run it on a laptop?", "Do I need a GPU?", "Does it run on a CPU?",
               "Can I try it without a GPU?"],
          ["No GPU is needed: it also runs on a laptop, on 8 virtual CPU devices."]),
    Topic([], ["How much memory do the weights of 70B need?", "How large is Llama 3 70B?",
               "How much GPU memory does 70B need?"],
          ["Llama-3-70B takes 141 GB in bfloat16, about 17.6 GB on each of 8 GPUs."]),
    Topic(["the reference deployment", "the target hardware"],
          ["Which GPUs is it made for?", "What hardware does it target?"],
          ["The reference deployment is Llama-3-70B-Instruct on one host with 8 H100 GPUs, as "
           "4 stages x 2 ranks."]),
    Topic(["a mesh", "the mesh", "mesh", "a device mesh"], ["How are the devices arranged?"],
          ["A mesh is a grid of devices with named axes. Here the axes are stage and model.",
           "The mesh arranges the GPUs in a grid: one axis for pipeline stages, one for tensor "
           "parallelism."]),
    Topic(["a stage", "stage", "a pipeline stage", "the stage axis"],
          ["How many layers are in a stage?"],
          ["A stage is a group of consecutive layers on its own devices. For 70B there are "
           "4 stages of 20 layers."]),
    Topic(["the pipeline", "pipeline parallelism", "a pipeline", "PP"],
          ["How does the pipeline work?"],
          ["Pipeline parallelism cuts the layers into stages. Activations move from stage to "
           "stage, one hop a tick."]),
    Topic(["tensor parallelism", "TP", "the model axis", "tensor parallel"],
          ["How is a layer split?", "How are the weights split?"],
          ["Tensor parallelism splits the weights of each layer over the model axis. Each rank "
           "makes a partial sum, and an all-reduce adds them."]),
    Topic(["the ring", "a ring", "ring"], ["How does the ring work?", "Why is it a ring?"],
          ["The ring joins the last stage to the first: a packet that leaves the last stage is "
           "sampled and enters stage 0 again, so nothing is ever drained."]),
    Topic(["a tick", "tick", "the tick"], ["What happens in a tick?", "How long is a tick?"],
          ["A tick is one step of the ring: every stage runs its layers on its packet, then the "
           "activations move on one stage."]),
    Topic(["a microbatch", "microbatch", "microbatches"], ["How many microbatches are there?"],
          ["A microbatch is a group of sequences that travels the ring together. There are as "
           "many microbatches as stages, so every stage has work."]),
    Topic(["a packet", "packet"], ["What is in a packet?", "What does a packet hold?"],
          ["A packet is what one stage works on in a tick: decode rows and, when there is "
           "prefill work, a chunk of prompt tokens."]),
    Topic(["an all-reduce", "all-reduce", "allreduce"],
          ["How many all-reduces are in a layer?", "How often do the ranks communicate?"],
          ["An all-reduce adds the partial sums of all ranks and gives everyone the result. "
           "Each layer needs two."]),
    Topic(["ppermute", "a collective permute", "the permute"],
          ["How do activations move between stages?", "How many permutes are in a tick?"],
          ["ppermute sends the activations of each stage to the next one. The ring needs one "
           "ppermute a tick."]),
    Topic(["a collective", "collectives", "collective communication"],
          ["Which collectives are used?", "What is communicated in a tick?"],
          ["A collective is communication among all devices. A tick needs two all-reduces a "
           "layer, one permute, and three more for the vocabulary."]),
    Topic(["the KV cache", "KV cache", "a KV cache", "the key value cache"],
          ["Why is there a KV cache?", "How does the KV cache work?"],
          ["The KV cache keeps the keys and values of past tokens, so that each new token needs "
           "only its own work. It is stored in pages."]),
    Topic(["a page", "page", "pages", "the page table"],
          ["Why is the cache paged?", "How does paging work?"],
          ["A page holds the keys and values of a fixed number of tokens. A sequence takes pages "
           "as it grows and gives them back when it ends."]),
    Topic(["prefill", "the prefill", "a prefill"], ["What happens in prefill?"],
          ["Prefill reads the prompt: many tokens at once, filling the KV cache. It sets the "
           "time to first token."]),
    Topic(["decode", "decoding", "the decode phase"], ["What happens in decode?"],
          ["Decode makes the answer one token at a time. It is limited by memory bandwidth, "
           "because every weight is read for each token."]),
    Topic(["TTFT", "time to first token", "the prefill latency"],
          ["What is the TTFT target?", "How fast is the first token?"],
          ["TTFT is the time to first token. The target for the reference deployment is at most "
           "500 ms."]),
    Topic(["TPOT", "time per output token", "the decode latency"],
          ["What is the TPOT target?", "How fast is decoding?"],
          ["TPOT is the time per output token: the number of stages times the tick. The target "
           "is at most 50 ms."]),
    Topic(["throughput", "the throughput"],
          ["What is the throughput target?", "How many requests per second can it serve?"],
          ["Throughput is how many requests are served in a second. The target for 70B is at "
           "least 8 requests/s."]),
    Topic(["continuous batching", "dynamic batching", "batching"],
          ["How are requests batched?", "Can requests join at any time?"],
          ["With continuous batching, requests join and leave the running batch at any tick. "
           "Nobody waits for a batch to end."]),
    Topic(["preemption", "a preemption"],
          ["What happens when the pages run out?", "What if the cache is full?"],
          ["Preemption takes the pages of one sequence when memory is short. Later its tokens "
           "are computed again, and it goes on."]),
    Topic(["chunked prefill", "a chunk", "a prefill chunk"],
          ["Why is the prompt cut into chunks?", "Do long prompts stall other users?"],
          ["Chunked prefill cuts a long prompt into chunks that travel with the decode rows, so "
           "a long prompt never stalls other streams."]),
    Topic(["greedy decoding", "greedy", "greedy search"], ["What does temperature 0 do?"],
          ["Greedy decoding always takes the most likely token. Ask for it with temperature 0."]),
    Topic(["sampling", "temperature", "top-p", "top-k"],
          ["How is the next token chosen?", "How does sampling work?"],
          ["Sampling draws the next token from the model's probabilities. Temperature, top-k, "
           "top-p and min-p shape the draw."]),
    Topic(["a bubble", "the bubble", "a pipeline bubble", "bubbles"],
          ["How are bubbles avoided?", "Are there bubbles?"],
          ["A bubble is time in which a stage has nothing to do. The ring keeps one microbatch "
           "per stage in flight, so no stage is idle."]),
    Topic(["a token", "token", "tokens", "the tokenizer"], ["What is a tokenizer?"],
          ["A token is a piece of text, often a word or a part of one. The tokenizer turns text "
           "into tokens and back."]),
    Topic(["a layer", "a transformer layer", "a decoder layer"], ["What is in a layer?"],
          ["A layer is attention followed by an MLP, each with a norm before it and a residual "
           "sum after it."]),
    Topic(["attention", "grouped-query attention", "GQA"], ["How does attention work?"],
          ["Attention lets a token look at earlier tokens. In Llama 3 several query heads share "
           "one key and value head, which keeps the KV cache small."]),
    Topic(["RoPE", "rotary embeddings", "rope scaling"], ["How are positions encoded?"],
          ["RoPE turns queries and keys by an angle that grows with the position, so attention "
           "sees relative distance."]),
    Topic(["RMSNorm", "a norm", "the norm"], ["Which norm does Llama use?"],
          ["RMSNorm divides a vector by its root mean square and scales it. It is computed in "
           "float32."]),
    Topic(["the scheduler", "a scheduler"], ["What does the scheduler do?"],
          ["The scheduler decides what enters the ring at each tick. It is plain Python and "
           "imports no JAX."]),
    Topic(["the vocabulary split", "the LM head", "the embedding"],
          ["Where is the embedding table?", "How is the vocabulary split?"],
          ["The embedding table and the LM head are split over the vocabulary on all ranks, so "
           "every GPU has the same memory and work."]),
    Topic(["JAX", "XLA"], ["Why JAX?", "Which framework is used?"],
          ["JAX turns Python functions into compiled programs for GPUs and CPUs. This engine is "
           "written in JAX and Flax."]),
    Topic(["Llama 3", "Llama", "a Llama model"], ["Which models can it run?"],
          ["Llama 3 is a family of language models. This engine runs it in any size; a new size "
           "is only a config."]),
    Topic(["sharding", "sharded inference", "a shard"], ["Why is the model sharded?"],
          ["Sharding splits a model over several devices, because a large model does not fit on "
           "one. Here it is split by layers and inside layers."]),
    Topic(["quantisation", "quantization", "8-bit weights"], ["Can weights be 8 bit?"],
          ["Quantisation stores weights in fewer bits. With 8-bit weights decode reads half as "
           "many bytes."]),
    Topic(["the HTTP server", "the API", "the OpenAI API"],
          ["Which API does the server speak?", "How do I send a request?"],
          ["The server speaks the OpenAI protocol over HTTP. It tokenises, and a second process "
           "owns the devices."]),
    Topic(["a rank", "rank", "a tensor-parallel rank"], ["How many ranks are in a stage?"],
          ["A rank is one device of a stage. In the 4 x 2 mesh each stage has 2 ranks, and each "
           "holds half of every layer."]),
    Topic(["the engine process", "the step loop"],
          ["How many processes are there?", "Which process owns the GPUs?"],
          ["The engine process owns all devices of a host and runs the step loop. The HTTP "
           "process holds no device."]),
    Topic(["recovery", "fault tolerance"],
          ["What happens if a GPU fails?", "What if the engine crashes?"],
          ["A device fault ends the engine process. The HTTP process sees it at once and still "
           "has every request and its tokens so far."]),
    Topic([], ["What is the license?", "Is it open source?", "Which licence does it have?"],
          ["The project is open source under the Apache 2.0 license."]),
    Topic(["a sequence", "a request"], ["What happens to my request?"],
          ["A request is a prompt with its settings. Its tokens are prefilled in chunks, then it "
           "decodes as one row of a microbatch."]),
    Topic(["warm-up", "the warm-up"], ["Why does the server warm up?"],
          ["Warm-up runs each compiled program once on empty packets, so that no user waits for "
           "a compile."]),
    Topic(["monitoring", "the metrics"], ["How do I monitor the server?"],
          ["The server counts requests, tokens and latencies, and shows them as metrics that "
           "Prometheus can read."]),
    Topic(["weights", "the weights", "a checkpoint"], ["Where are the weights stored?"],
          ["On disk a checkpoint has one array per weight per layer. At load each shard goes "
           "straight to its device."]),
    Topic(["latency", "low latency"], ["What limits the latency?", "How can I make it faster?"],
          ["Latency has two parts: TTFT for the first token and TPOT for each one after it. "
           "Smaller weights make both better."]),
    Topic(["a GPU", "GPUs", "an H100"], ["What is a GPU good for?"],
          ["A GPU is a processor for parallel arithmetic. An H100 has 80 GB of memory, so a 70B "
           "model needs several."]),
    Topic(["inference", "a language model", "an LLM"], ["How does a language model work?"],
          ["Inference runs a trained model: it predicts the next token again and again until "
           "the answer ends."]),
    Topic([], ["What is the difference between prefill and decode?", "Prefill or decode?",
               "How do prefill and decode differ?", "Compare prefill and decode."],
          ["Prefill reads the whole prompt at once; decode writes one token at a time. Prefill is "
           "limited by arithmetic, decode by memory bandwidth."]),
    Topic([], ["What is the difference between a stage and a rank?", "Pipeline or tensor parallel?",
               "How do pipeline and tensor parallelism differ?", "Stage or model axis?"],
          ["Stages split the model by layers; ranks split each layer. The mesh is stage x model."]),
    Topic([], ["Can you add numbers?", "Can you do maths?", "Can you calculate?"],
          ["I can add two whole numbers below 100. Try 27 + 48."]),
    Topic([], ["Tell me a joke.", "Do you know a joke?", "Make me laugh"],
          ["Why did the stage feel lonely? Its microbatch was always moving on."]),
]

SYSTEM_PROMPTS: list[str] = [
    "You are a helpful assistant.", "You are a helpful, concise assistant.", "Answer briefly.",
    "You are a friendly chatbot.", "You are an expert on inference.", "Be short and precise.",
    "You are a helpful AI assistant for engineers.", "You are the demo model of this project.",
    "You answer questions about this project.", "Answer in one or two sentences.",
]

# Things outside the project: the subjects of questions that the model must decline.
FOREIGN: list[str] = """
the weather;Paris;the moon;France;a cat;a dog;photosynthesis;the capital of Spain;the president;
football;chess;a guitar;Shakespeare;quantum physics;gravity;a black hole;the French Revolution;
pizza;coffee;tea;chocolate;the stock market;bitcoin;a mortgage;a car;a bicycle;the ocean;a whale;
an elephant;a tree;a flower;the sun;Mars;Rome;Berlin;Japan;China;India;Africa;love;happiness;time;
philosophy;Plato;music;jazz;a piano;a novel;poetry;a film;Star Wars;a doctor;medicine;a vaccine;
cancer;the heart;a brain;DNA;evolution;a dinosaur;history;World War II;Napoleon;democracy;a law;
money;a bank;inflation;a recipe;bread;cheese;wine;a vegetable;a garden;rain;snow;a river;
a mountain;the Eiffel Tower;London;New York;a train;an aeroplane;a rocket;NASA;a robot;a phone;
the internet;email;Excel;Java;Rust;C++;HTML;a database;SQL;Linux;Windows;Docker;Kubernetes;
a blockchain;a prime number;algebra;geometry;calculus;pi;an integral;chemistry;water;gold;iron;
oxygen;a battery;electricity;a magnet;light;sound;colour;red;yoga;sleep;a dream;religion;Buddhism;
the Bible;a holiday;Christmas;a birthday;a wedding;a child;school;a university;Einstein;Mozart;
Picasso;tennis;the Olympics;basketball;a shoe;a hat;fashion;a house;a kitchen;a lamp;a clock
""".replace("\n", "").split(";")

FOREIGN_QUESTIONS: list[str] = [
    "Who won the world cup?", "What's the weather like today?", "Write me a poem.",
    "Translate this into French.", "What time is it?", "Who is the president?",
    "Write a story about a dragon.", "Recommend a good film.", "How do I cook rice?",
    "What is the meaning of life?", "Can you write Python code?", "How tall is Mount Everest?",
    "Who wrote Hamlet?", "What should I eat tonight?", "Sing me a song.",
    "Give me financial advice.", "How old is the universe?", "Where can I buy shoes?",
    "Who invented the telephone?", "Draw me a picture.", "What is your favourite colour?",
    "Book me a flight.", "Do you like music?", "How far is the moon?", "Tell me a story.",
]
