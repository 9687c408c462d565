"""``mmts pilot``: small heads on frozen features, over seeds, to see in minutes what a schedule may do."""
