from drpo.cli import main

main()
