"""The Llama family over a plain dict of arrays."""
