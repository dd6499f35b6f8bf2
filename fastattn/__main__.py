"""``python -m fastattn --info``: what this build runs on."""

import argparse

import fastattn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastattn", description="Attention for NumPy arrays on CPUs.")
    parser.add_argument("--info", action="store_true", help="print version, instruction sets, threads and OpenMP")
    parser.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    arguments = parser.parse_args()
    if arguments.info:
        fastattn.show_config()
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
