"""placeholder"""


def add_parser(commands, logging_options):
    pass
