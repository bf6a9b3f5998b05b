"""Who may ask the server: the key as clients write it."""

import pytest

from stackctl.serving.guard import Guard


def admits(key: str, sent: bytes) -> bool:
    """Whether a request with these bytes in its header may pass; a server reads them as latin-1."""
    headers = {"host": "127.0.0.1", "authorization": sent.decode("latin-1")}
    try:
        Guard("127.0.0.1", key).check("POST", "/v1/models", headers)
    except Exception as error:
        assert getattr(error, "status", None) == 401
        return False
    return True


@pytest.mark.parametrize(
    ("key", "sent", "right"),
    [
        ("secret", b"Bearer secret", True), ("secret", b"bearer  secret ", True), ("secret", b"Bearer Secret", False),
        ("secret", b"secret", False), ("secret", b"", False), ("cl\xe9", "Bearer cl\xe9".encode(), True),
        ("cl\xe9", b"Bearer cl\xe9", True), ("cl\xe9", b"Bearer cl?", False),
        ("\u6d77", "Bearer \u6d77".encode(), True), ("\u6d77", b"Bearer ?", False),
    ],
)  # fmt: skip
def test_a_key_is_the_same_in_utf_8_and_latin_1_and_nothing_else_is(key: str, sent: bytes, right: bool) -> None:
    """What curl sends of a key with an accent was refused."""
    assert admits(key, sent) == right
