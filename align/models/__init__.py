"""Loading, attention, adapters and saving of transformers models."""

import logging

# On some processors bitsandbytes, which PEFT imports, logs the advice to install code from the hub. align never runs
# such code, so the message is switched off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
