from drpo.cli.main import main

main()
