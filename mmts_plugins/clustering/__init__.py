"""Captions, labels or embeddings to a cluster table, once before training: the work of ``mmts cluster``.

Runs outside the training process and may live in another environment; needs the extra ``mmts-plugins[cluster]``.
"""
