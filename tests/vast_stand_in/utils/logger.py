import logging

logging.basicConfig(format="%(levelname)s - %(name)s - %(message)s", level=logging.INFO)
LOGGER = logging.getLogger("__main__")
