"""Each host's conventions translated to the core. Imports without the host; patches nothing."""
