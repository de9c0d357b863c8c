"""Loading, attention, adapters and saving of transformers models."""

import logging

# On some processors bitsandbytes, which PEFT imports, asks to have code from the hub installed. Nothing here runs such
# code.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
