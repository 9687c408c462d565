from .vast import VAST

model_registry = {"vast": VAST}
