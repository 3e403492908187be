"""The image server: decodes hostile bytes in separate processes."""
