"""The third program, of which the tests need no more than that it is there."""


def inference_cli() -> None:
    raise NotImplementedError
