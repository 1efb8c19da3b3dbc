import logging

from condiquant_recipes import hosts


def test_handlers_of_the_hosts_log_keep_their_levels():
    """NNCF's own ``set_log_level`` would silence whatever else they serve."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO)
    host = logging.getLogger("nncf")
    host.addHandler(handler)
    try:
        hosts.load("exporting")
        assert handler.level == logging.INFO
        assert host.getEffectiveLevel() == logging.ERROR
    finally:
        host.removeHandler(handler)
