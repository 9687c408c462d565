"""What a temperature does to a model, as Sun & Li (TMLR 2024) look at it: the work of ``mmts analyze``."""
