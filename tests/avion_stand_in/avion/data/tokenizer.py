import torch


class Words:
    """Bytes, as much of a tokenizer as AVION's ``_tokenizer`` is asked for."""

    def decode(self, tokens):
        return bytes(tokens).decode()


_tokenizer = Words()


def tokenize(texts, context_length=77):
    texts = [texts] if isinstance(texts, str) else texts
    result = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(result, texts):
        ids = [500, *text.lower().encode(), 501][:context_length]
        row[: len(ids)] = torch.tensor(ids)
    return result
