"""What the commands of `effformer` do: a module each, with `main(arguments) -> exit status`."""
