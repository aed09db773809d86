"""The experiments behind the ``nesterov-triton`` command, from the bottom up:

``models`` builds the compared layers; ``digits`` and ``point_cloud`` hold one experiment each (data, networks,
settings); ``training`` runs one model with one seed; ``folder`` keeps what is done on disk; ``progress`` and
``report`` show it; ``compare`` puts these together; ``cli`` reads the command line.
"""
