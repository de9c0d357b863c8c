"""Trees of tokens, rows packed from them, and the loader that turns epochs into optimiser steps."""
