"""Loading of open_clip models by name, from a file or from a folder, with their tokenizers."""
