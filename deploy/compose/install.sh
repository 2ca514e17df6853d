#!/bin/sh
# Makes /opt/stella, in two steps, of which the first is done again only when a dependency has changed.
# install.sh dependencies EXTRA[,EXTRA]   the pinned packages of these extras
# install.sh code ROOM[,ROOM]             our own code, without that of the services that are not named
set -eu
pip="/pip/bin/pip --python /opt/stella/bin/python --disable-pip-version-check -q"
case $1 in
  dependencies)
    python3 -m venv --without-pip /opt/stella
    python3 - "$2" >/tmp/wanted <<'END'
import sys, tomllib
project = tomllib.load(open("/pyproject.toml", "rb"))["project"]
print(*project["dependencies"], sep="\n")
for extra in sys.argv[1].split(","):
    print(*project["optional-dependencies"][extra], sep="\n")
END
    $pip install -c /requirements.lock -r /tmp/wanted
    ;;
  code)
    $pip install --no-deps /wheel/*.whl
    $pip check
    for room in collector enricher signer gateway cli; do
      case ",$2," in
        *",$room,"*) ;;
        *) rm -rf /opt/stella/lib/python3*/site-packages/stella_$room ;;
      esac
    done
    case ",$2," in *",cli,"*) ;; *) rm -f /opt/stella/bin/stella ;; esac
    ;;
esac
