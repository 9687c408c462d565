"""``mmts eval``: retrieval and zero-shot numbers of a model or of saved features, with intervals, by head and tail."""
