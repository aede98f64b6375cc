"""The commands of the program ``offload-sparse``.

A command reads its options first and imports what it needs afterwards, so that help and mistakes in the
command line never wait for torch.
"""
