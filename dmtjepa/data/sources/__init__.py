"""Where images come from: folders, file lists, tar shards, and the drawn set."""
