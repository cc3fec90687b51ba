"""What the OpenAI client sends for each parameter, and what of it the engine gets."""

# In the client's words, and in the engine's.
SHARED = [
    ({"temperature": 0.5}, {"temperature": 0.5}),
    ({"top_p": 0.9}, {"top_p": 0.9}),
    ({"seed": 7}, {"seed": 7}),
    ({"max_tokens": 5}, {"max_tokens": 5}),
    ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}),
    ({"frequency_penalty": -0.5}, {"frequency_penalty": -0.5}),
    ({"logit_bias": {"5": 10, "6": -10}}, {"logit_bias": ((5, 10.0), (6, -10.0))}),
    ({"stop": "x"}, {"stop": ("x",)}),
    ({"stop": ["x", "y"]}, {"stop": ("x", "y")}),
    ({"n": None, "stop": None, "seed": None}, {"stop": (), "seed": None}),
]
# Not OpenAI's: sent as the client's `extra_body`.
EXTENSIONS = [
    ({"extra_body": fields}, expected)
    for fields, expected in [
        ({"top_k": 5}, {"top_k": 5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"min_tokens": 2}, {"min_tokens": 2}),
        ({"stop_token_ids": [5, 6]}, {"stop_token_ids": (5, 6)}),
        ({"ignore_eos": True, "max_tokens": 5}, {"ignore_eos": True}),
        ({"cache_salt": "mine"}, {"cache_salt": "mine"}),
    ]
]
LABELS = [{"user": "me"}, {"extra_body": {"metadata": {"a": "b"}, "service_tier": "auto"}}]
