"""Where the three commands begin: `models` and `privacy` are those beside this file, or the command says which ones were found.

Other software uses these names too, and a PYTHONPATH may put it first. That has to be said before anything of ours is loaded,
because what is loaded next would be theirs. `doctor` alone goes on then, with ours, and reports it. So does it where a
package that we need is missing, with as much as can be loaded.
"""

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import NoReturn

HOME = Path(__file__).resolve().parent
PACKAGES = ("privacy", "models", "fl_client", "fl_server")


def shadows() -> dict[str, str]:
    """Package of ours -> where the one lies that would be loaded in its place."""
    found = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec else ["nowhere"]
        if not any(HOME in Path(place).resolve().parents for place in places if place):
            found[name] = next((place for place in places if place), "nowhere")
    return found


def fl_client() -> None:
    _begin("fl_client.cli")


def fl_server() -> None:
    _begin("fl_server.cli")


def fl_study() -> None:
    _begin("fl_server.research")


def _begin(command: str) -> None:
    others = shadows()
    sys.path.insert(0, str(HOME))
    for name in PACKAGES:
        importlib.import_module(name)  # from now on everything below these names is ours
    sys.path.pop(0)
    try:
        from privacy import console

        console.SHADOWS.update(others)
        if others and sys.argv[1:2] != ["doctor"]:
            console.show(console.shadowed(others))
            sys.exit(1)
        main = importlib.import_module(command).main
    except ImportError as error:
        _half_there(error)
    main()


def _half_there(error: ImportError) -> NoReturn:
    """Say that a package is missing or does not load; `doctor` still looks at the machine if it can be loaded itself."""
    print(f"a package that Isocenter needs cannot be loaded: {error}", file=sys.stderr)
    print("Install it anew in an environment of its own: pip install --force-reinstall isocenter", file=sys.stderr)
    if sys.argv[1:2] == ["doctor"]:
        with contextlib.suppress(ImportError):
            from privacy import doctor, doctor_cli

            doctor_cli.show(doctor.of_machine(Path()), "--json" in sys.argv)
    sys.exit(1)
