"""Packing trees into rows of micro-batches, and the loader that turns epochs into optimiser steps."""
