"""What a trained model is worth: losses of any text, benchmarks, paired comparisons, lm-evaluation-harness."""
