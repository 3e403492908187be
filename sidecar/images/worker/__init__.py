"""The image server: decodes hostile bytes in processes of their own."""
