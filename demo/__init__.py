"""The bundled demo checkpoint: its text, its tokenizer, its training and its evaluation."""
