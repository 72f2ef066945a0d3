"""The Triton kernels, imported as `effformer.kernels`. They know tensors only, never model code."""

if __name__ == "kernels":
    # Python was started in this repository, and somebody asked for the PyPI package of that name: transformers does,
    # to see whether it is there and how old. It must find none that it would use, and must not fail on the way.
    __version__ = "0.0.0"

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"kernels.{name}: this is a folder of effformer (import it as effformer.kernels), which hides the PyPI "
            "package 'kernels' when Python is started here"
        )
