"""The commands of `effformer`: a module each, with `add(commands)` for its options and `main(arguments) -> int`."""
