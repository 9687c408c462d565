"""Reading: captions, tars, embeddings, classes and images, the encoders of the two, and what is kept of them.

Serves clustering, evaluation and reports. :mod:`.classes` also runs inside training and needs NumPy and Arrow alone.
"""
