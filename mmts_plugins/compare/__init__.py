"""``mmts compare``: a host's command plain, with TS, with ICS and with both, over several seeds, into one table."""
