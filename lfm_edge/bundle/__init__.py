"""From a checkpoint to a sealed directory, and opening one."""
