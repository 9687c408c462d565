"""The sub-commands of ``mmts``, a module each: its arguments, and a call of the room that does the work.

A module has ``add_parser(commands, help)`` and imports nothing heavy until its command runs. The one that is asked for
is imported by :mod:`mmts_plugins.cli`.
"""

from __future__ import annotations

# In the order of ``mmts --help``.
COMMANDS = {
    "cluster": "make the cluster table from captions, labels or embeddings (once, before training)",
    "stability": "how much of a cluster table is chance: rank correlation between seeds, between halves of the data",
    "run": "start a host with the plugin armed, without the start-up file",
    "doctor": "check hosts, seams, start-up file and cluster table before a run",
    "schedule": "resolve a run's --loss and --mmts-* flags without host or GPU, and show the temperatures they lead to",
    "plot": "draw a schedule before training",
    "report": "one page about cluster tables, or about training runs",
    "demo": "train a small OpenCLIP model plain and with MM-TS, and compare them (2-3 minutes on two CPU cores)",
    "eval": "retrieval and zero-shot numbers with intervals, for head, middle and tail",
    "analyze": "what a temperature does to a model: equilibrium, similarities, loss landscape, linear probe",
    "export": "a trained model as TorchScript, for code that has neither OpenCLIP nor this plugin",
    "pilot": "small heads on frozen features, over seeds: what a schedule may do on your data, in ten minutes",
    "compare": "train plain, TS, ICS and TS&ICS over seeds with your command, and tabulate",
}
