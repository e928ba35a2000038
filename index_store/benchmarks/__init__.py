"""Benchmarks of the store against bare faiss. The installed package does not contain them."""
