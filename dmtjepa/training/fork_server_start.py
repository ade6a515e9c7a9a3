"""Imported by the fork server alone, at its start: it ends with the process that started it.

It imports what ranks need, once for all of them.
"""

import gc

from dmtjepa.processes import die_with_parent

die_with_parent()

import torch._dynamo  # noqa: E402, F401  # by FSDP2 and AdamW, at their first use

import dmtjepa.training.launch  # noqa: E402, F401

gc.freeze()  # a collection in a rank would write to every page that it shares with the server
