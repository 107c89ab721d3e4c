import pytest

from training_framework.errors import UserError


def test_an_error_is_one_line_with_its_cure():
    error = UserError("a.yaml: line one\n  line two", "mend\tit")
    assert str(error) == "a.yaml: line one line two; mend it"
    with pytest.raises(ValueError, match="mend it"):
        raise error
