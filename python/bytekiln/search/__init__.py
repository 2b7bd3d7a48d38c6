"""The learning-rate search: range test, halving, fit with its interval, confirmation, transfer to another size."""
