"""Reading and writing: files that appear whole or not at all, YAML, safetensors, GGUF, pictures, private names."""
