"""The C++ runtime beside the Python one."""
