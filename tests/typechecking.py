"""What decorates the functions of the modules that pyproject.toml names, to check signatures."""

from beartype import BeartypeConf, beartype

# An int is a float, as for type checkers.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
