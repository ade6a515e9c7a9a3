"""What several test files share: runs, processes, images, models. Tests import from here, never from each other."""
