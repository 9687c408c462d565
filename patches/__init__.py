"""Each host's seams: where we cut in, what we rely on, and how to take it out again. No maths."""

BUILT_IN = ("openclip", "avion", "vast", "transformers", "sentence_transformers", "lightning")
