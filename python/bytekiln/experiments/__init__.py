"""Whole experiments: a learning-rate search with its files and pictures, and the pipeline behind it."""
