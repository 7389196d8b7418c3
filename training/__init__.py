"""Offline commands that make what the server loads: base models, reward models, proxies."""
