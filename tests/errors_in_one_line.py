"""What a call says that cannot be done."""

import pytest

from condiquant_plugin.errors import InputError


def message_of(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
