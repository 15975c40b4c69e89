"""Tests; and the run-time type checker they run under, to which an int is a float, as to a static one."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
