"""Files that are made from others: ``python -m tests.generated`` tells those that differ, ``--write`` writes them."""

import re
import sys
from pathlib import Path

from tunewright_crds.definitions import definitions, to_yaml

ROOT = Path(__file__).parents[1]


def generated() -> dict[Path, str]:
    """What each generated file must hold. The chart installs the definitions only if asked to, and keeps them unless told not to."""
    files = {}
    for name, definition in definitions().items():
        files[ROOT / "crds" / name] = to_yaml(definition)
        plain = re.sub(
            r"{{|}}", lambda braces: f"{{{{ `{braces.group()}` }}}}", to_yaml(definition)
        )  # descriptions speak of Jinja, helm must not act on it
        kept = plain.replace(
            f'  name: "{definition["metadata"]["name"]}"\n',
            f'  name: "{definition["metadata"]["name"]}"\n  {{{{- if .Values.crds.keep }}}}\n  annotations:\n    helm.sh/resource-policy: keep\n  {{{{- end }}}}\n',
            1,
        )
        files[ROOT / "charts" / "tunewright" / "templates" / f"crd-{name}"] = f"{{{{- if .Values.crds.install }}}}\n{kept}{{{{- end }}}}\n"
    return files


def main() -> int:
    write = "--write" in sys.argv[1:]
    stale = [path for path, text in generated().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(generated()[path], encoding="utf-8")
        print(f"{'wrote' if write else 'differs, run `make crds`:'} {path.relative_to(ROOT)}")
    return 1 if stale and not write else 0


if __name__ == "__main__":
    sys.exit(main())
